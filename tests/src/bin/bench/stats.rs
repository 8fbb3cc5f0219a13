//! Medians, percentiles and confidence intervals.

/// A median with its 95 % confidence interval, by order statistics: the only assumption is that the values are
/// independent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) samples: usize,
}

impl Estimate {
    /// Returns the estimate of `values`; NaN without any.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        // The number of values below the true median is binomial: n/2, give or take 1.96 sqrt(n)/2.
        let spread = 0.98 * (n as f64).sqrt();
        let middle = n as f64 / 2.0;
        let at = |rank: f64| {
            let last = n.saturating_sub(1) as f64;
            sorted.get(rank.clamp(0.0, last) as usize).copied().unwrap_or(f64::NAN)
        };
        Self {
            median: median(&sorted),
            low: at((middle - spread).floor()),
            high: at((middle + spread).ceil() - 1.0),
            samples: n,
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    let n = sorted.len();
    match (sorted.get(n / 2), sorted.get((n.max(1) - 1) / 2)) {
        (Some(upper), Some(lower)) => (upper + lower) / 2.0,
        _ => f64::NAN,
    }
}

/// Returns the median of `values`; NaN without any.
pub(crate) fn median_of(values: impl IntoIterator<Item = f64>) -> f64 {
    Estimate::of(values).median
}

/// Returns the value below or at which the share `p` (0 to 1) of `values` lies; NaN without any.
pub(crate) fn percentile(values: impl IntoIterator<Item = f64>, p: f64) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_its_interval() {
        let estimate = Estimate::of((1..=100).rev().map(f64::from));
        assert_eq!(estimate, Estimate { median: 50.5, low: 41.0, high: 60.0, samples: 100 });
        assert_eq!(Estimate::of([3.0, 1.0, 2.0]), Estimate { median: 2.0, low: 1.0, high: 3.0, samples: 3 });
        assert!(Estimate::of([]).median.is_nan());
    }

    #[test]
    fn percentiles() {
        let values = (1..=200).map(f64::from);
        assert_eq!(percentile(values.clone(), 0.5), 100.0);
        assert_eq!(percentile(values.clone(), 0.99), 198.0);
        assert_eq!(percentile(values, 1.0), 200.0);
        assert_eq!(percentile([7.0], 0.01), 7.0);
        assert!(percentile([], 0.5).is_nan());
    }
}
