//! Durations in Go's notation: `1h30m`, `250ms`, `-1.5s`. There is no unit for days.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A signed span of time in nanoseconds, Go's `time.Duration`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GoDuration(i64);

/// A text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DurationError {
    /// Not a sequence of numbers with units.
    #[error("`{0}` is not a duration such as 30s, 1h30m or 250ms (units: ns, us, ms, s, m, h)")]
    Syntax(String),
    /// More than 292 years.
    #[error("the duration `{0}` is too long")]
    TooLong(String),
}

/// Units with their nanoseconds. Two letters look like µ, and both are in use.
const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl GoDuration {
    /// No time.
    pub(crate) const ZERO: Self = Self(0);

    /// Returns a duration of whole seconds.
    pub(crate) const fn from_secs(seconds: i32) -> Self {
        Self(seconds as i64 * 1_000_000_000)
    }

    /// Converts to the type of the standard library. A negative duration becomes zero.
    pub(crate) fn to_std(self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }
}

impl FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let syntax = || DurationError::Syntax(text.to_owned());
        let too_long = || DurationError::TooLong(text.to_owned());
        let (negative, mut rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if rest == "0" {
            return Ok(Self::ZERO);
        }
        if rest.is_empty() {
            return Err(syntax());
        }
        let mut total: u128 = 0;
        while !rest.is_empty() {
            let (whole, after) = digits(rest);
            let (fraction, after) = after.strip_prefix('.').map_or(("", after), digits);
            if whole.is_empty() && fraction.is_empty() {
                return Err(syntax());
            }
            let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            let (_, unit) = UNITS.into_iter().find(|(known, _)| *known == name).ok_or_else(syntax)?;
            if !whole.is_empty() {
                let whole: u64 = whole.parse().map_err(|_overflow: std::num::ParseIntError| too_long())?;
                total += u128::from(whole) * u128::from(unit);
            }
            // Digits beyond the 18th are less than a nanosecond in every unit.
            let (mut part, mut scale) = (0, 1);
            for digit in fraction.bytes().take(18) {
                part = part * 10 + u128::from(digit - b'0');
                scale *= 10;
            }
            total += part * u128::from(unit) / scale;
            if total > i64::MAX as u128 {
                return Err(too_long());
            }
            rest = after;
        }
        let nanos = i64::try_from(total).map_err(|_overflow| too_long())?;
        Ok(Self(if negative { -nanos } else { nanos }))
    }
}

/// Returns the digits that `text` begins with, and the rest.
fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

impl fmt::Display for GoDuration {
    /// Writes hours, minutes and seconds, beginning with the largest unit that is not zero. Below a second, writes a
    /// single unit.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.unsigned_abs();
        if self.0 < 0 {
            f.write_str("-")?;
        }
        let (seconds, below) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        match nanos {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{nanos}ns"),
            1_000..1_000_000 => write!(f, "{}\u{b5}s", decimal(nanos / 1_000, nanos % 1_000, 3)),
            1_000_000..1_000_000_000 => write!(f, "{}ms", decimal(nanos / 1_000_000, nanos % 1_000_000, 6)),
            _ => {
                let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
                if hours > 0 {
                    write!(f, "{hours}h")?;
                }
                if seconds >= 60 {
                    write!(f, "{minutes}m")?;
                }
                write!(f, "{}s", decimal(seconds % 60, below, 9))
            }
        }
    }
}

/// Returns a number with the decimal places of `fraction` (`width` of them), without trailing zeros.
fn decimal(whole: u64, fraction: u64, width: usize) -> String {
    let text = format!("{whole}.{fraction:0width$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_go_reads() {
        for (text, nanos) in [
            ("0", 0),
            ("0s", 0),
            ("-0", 0),
            ("30s", 30_000_000_000),
            ("+5s", 5_000_000_000),
            ("-5s", -5_000_000_000),
            ("1h30m", 5_400_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("5.s", 5_000_000_000),
            ("10.5s4m", 250_500_000_000),
            ("250ms", 250_000_000),
            ("7us", 7_000),
            ("7\u{b5}s", 7_000),
            ("7\u{3bc}s", 7_000),
            ("9007199254740993ns", 9_007_199_254_740_993),
            ("0.3333333333333333333h", 1_200_000_000_000 - 1),
            ("0.100000000000000000000h", 360_000_000_000),
            ("9223372036854775807ns", i64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(GoDuration(nanos)), "{text}");
        }
        for text in ["", "-", "3", "1d", "s", ".s", "1h-5m", " 5s", "5 s", "--5s", "1e3s", "1,5s", "NaNs"] {
            assert_eq!(text.parse::<GoDuration>(), Err(DurationError::Syntax(text.to_owned())), "{text}");
        }
        for text in ["9223372036854775808ns", "3000000h", "99999999999999999999999h", "2562047h48m"] {
            assert_eq!(text.parse::<GoDuration>(), Err(DurationError::TooLong(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn what_go_writes() {
        for (text, want) in [
            ("0", "0s"),
            ("30s", "30s"),
            ("90s", "1m30s"),
            ("15m", "15m0s"),
            ("24h", "24h0m0s"),
            ("1h0.5s", "1h0m0.5s"),
            ("250ms", "250ms"),
            ("1500us", "1.5ms"),
            ("1001ns", "1.001\u{b5}s"),
            ("999ns", "999ns"),
            ("-2m3.4s", "-2m3.4s"),
        ] {
            assert_eq!(text.parse::<GoDuration>().unwrap().to_string(), want);
        }
        assert_eq!(GoDuration::from_secs(-7).to_std(), Duration::ZERO);
        assert_eq!(GoDuration::from_secs(7).to_std(), Duration::from_secs(7));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(nanos in -i64::MAX..=i64::MAX) {
            let duration = GoDuration(nanos);
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn no_text_makes_it_panic(text in "[-+]?[0-9.hmsnu\u{b5}]{0,24}") {
            let _ = text.parse::<GoDuration>();
        }
    }
}
