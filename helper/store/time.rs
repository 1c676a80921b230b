//! Points in time as the store writes them: RFC 3339 in UTC with milliseconds, nothing else.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Milliseconds since 1970-01-01T00:00:00Z. Written as `2026-11-26T07:31:05.042Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

/// The last millisecond of the year 9999, the last that RFC 3339 can write.
const LAST: u64 = 253_402_300_799_999;

impl Time {
    pub fn now() -> Time {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Time::from_millis(u64::try_from(since.as_millis()).unwrap_or(LAST))
    }

    /// `millis` since 1970, cut at the end of the year 9999.
    pub fn from_millis(millis: u64) -> Time {
        Time(millis.min(LAST))
    }

    pub fn millis(self) -> u64 {
        self.0
    }

    /// How long ago this was; zero for a time to come (clocks of nodes differ).
    pub fn age(self) -> Duration {
        Duration::from_millis(Time::now().0.saturating_sub(self.0))
    }

    /// Reads exactly the form that is written, and nothing else of RFC 3339.
    pub fn parse(text: &str) -> Option<Time> {
        let bytes = text.as_bytes();
        let shape = b"dddd-dd-ddTdd:dd:dd.dddZ";
        if bytes.len() != shape.len()
            || !bytes.iter().zip(shape).all(|(b, s)| match s {
                b'd' => b.is_ascii_digit(),
                other => b == other,
            })
        {
            return None;
        }
        let number = |from: usize, to: usize| {
            bytes[from..to]
                .iter()
                .fold(0u64, |n, b| n * 10 + u64::from(b - b'0'))
        };
        let (year, month, day) = (number(0, 4), number(5, 7), number(8, 10));
        let (hour, minute, second) = (number(11, 13), number(14, 16), number(17, 19));
        let fits = year >= 1970
            && (1..=12).contains(&month)
            && (1..=days_in(year, month)).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        if !fits {
            return None;
        }
        let days = (1970..year).map(days_of_year).sum::<u64>()
            + (1..month).map(|m| days_in(year, m)).sum::<u64>()
            + (day - 1);
        Some(Time(
            (((days * 24 + hour) * 60 + minute) * 60 + second) * 1000 + number(20, 23),
        ))
    }
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_year(year: u64) -> u64 {
    if leap(year) { 366 } else { 365 }
}

fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 if leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl fmt::Display for Time {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (millis, seconds) = (self.0 % 1000, self.0 / 1000);
        let (mut days, of_day) = (seconds / 86400, seconds % 86400);
        let mut year = 1970;
        while days >= days_of_year(year) {
            days -= days_of_year(year);
            year += 1;
        }
        let mut month = 1;
        while days >= days_in(year, month) {
            days -= days_in(year, month);
            month += 1;
        }
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        write!(
            out,
            "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z",
            days + 1
        )
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Time, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(from)?;
        Time::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "expected a time like 2026-11-26T07:31:05.042Z, found {text:?}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_times() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (LAST, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(Time::from_millis(millis).to_string(), text);
            assert_eq!(Time::parse(text), Some(Time(millis)));
        }
        for text in [
            "",
            "2023-02-29T00:00:00.000Z",
            "2023-01-01T24:00:00.000Z",
            "1969-12-31T23:59:59.999Z",
        ] {
            assert_eq!(Time::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn reads_what_it_writes(millis in 0..=LAST) {
            prop_assert_eq!(Time::parse(&Time(millis).to_string()), Some(Time(millis)));
        }

        #[test]
        fn never_panics(text in "\\PC{0,30}") {
            let _ = Time::parse(&text);
        }
    }
}
