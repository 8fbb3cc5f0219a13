//! Bounds of buckets, as Go writes numbers.
//!
//! A bound is the text of a label, and series are told apart by it. With `le="1.0"` beside kube-proxy's `le="1"`, a sum
//! over both is wrong, and a rule for one bound finds nothing. kube-proxy speaks only Prometheus' older format, where
//! client_golang writes `1`. Vipr writes the same in OpenMetrics, which recommends `1.0` but does not demand it.

const LABEL: &str = "{le=\"";

/// Returns `text` with the bounds of all buckets in Go's shortest form.
pub(super) fn as_client_golang(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let bound = line.split_once(LABEL).filter(|(name, _)| !name.starts_with('#') && !name.contains(' '));
        match bound.and_then(|(name, rest)| Some((name, rest.split_once('"')?))) {
            Some((name, (bound, rest))) => {
                let bound = bound.parse().map_or_else(|_| bound.to_owned(), shortest);
                out += &[name, LABEL, &bound, "\"", rest].concat();
            }
            None => out += line,
        }
    }
    out
}

/// Formats a number like Go's `strconv.FormatFloat(number, 'g', -1, 64)`: with an exponent of at least two digits if
/// the number is smaller than 0.0001, or a million or larger.
fn shortest(number: f64) -> String {
    if number.is_infinite() {
        return if number > 0.0 { "+Inf" } else { "-Inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let exponent = scientific
        .split_once('e')
        .and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?)));
    match exponent {
        Some((digits, exponent)) if !(-4..6).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        Some(_) | None => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_gos() {
        for (number, want) in [
            (1.0, "1"),
            (0.005, "0.005"),
            (16.384, "16.384"),
            (300.0, "300"),
            (262_144.0, "262144"),
            (1_048_576.0, "1.048576e+06"),
            (16_777_216.0, "1.6777216e+07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (2.5e120, "2.5e+120"),
            (0.0, "0"),
            (f64::INFINITY, "+Inf"),
            (f64::NEG_INFINITY, "-Inf"),
        ] {
            assert_eq!(shortest(number), want);
        }
    }

    #[test]
    fn nothing_but_bounds_changes() {
        let given = "# HELP a Of {le=\"1.0\"}.\n# TYPE a histogram\na_sum{x=\"{le=1.0\"} 1.0\na_bucket{le=\"1.0\",x=\"1.0\"} 1\n\
                     a_bucket{le=\"+Inf\"} 1\nb_bucket{le=\"what\"} 1\nc 2.0\n# EOF\n";
        let want = given.replace("a_bucket{le=\"1.0\",", "a_bucket{le=\"1\",");
        assert_eq!(as_client_golang(given), want);
    }
}
