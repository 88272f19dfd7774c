//! Times as people read them: RFC 3339, in UTC.

/// Milliseconds in a day.
const DAY: u64 = 24 * 60 * 60 * 1000;
/// After so many years, and days, the calendar repeats itself.
const CYCLE: (u64, u64) = (400, 146_097);

/// Writes a time, given in milliseconds since the epoch (1970-01-01T00:00:00Z).
pub fn utc(ms: u64) -> String {
    let (days, in_day) = (ms / DAY, ms % DAY);
    let (mut year, mut day) = (1970 + days / CYCLE.1 * CYCLE.0, days % CYCLE.1);
    while day >= 365 + leap_day(year) {
        day -= 365 + leap_day(year);
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + leap_day(year), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let (hours, minutes, seconds) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60);
    format!("{year:04}-{month:02}-{:02}T{hours:02}:{minutes:02}:{seconds:02}.{:03}Z", day + 1, in_day % 1000)
}

/// 1 in a leap year.
fn leap_day(year: u64) -> u64 {
    u64::from(year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        // As date(1) has them: `date -u -d @SECONDS`.
        let table = [
            (0, "1970-01-01T00:00:00.000Z"),
            (5_097_599_999, "1970-02-28T23:59:59.999Z"),
            (5_097_600_000, "1970-03-01T00:00:00.000Z"),
            (31_535_999_000, "1970-12-31T23:59:59.000Z"),
            (31_536_000_000, "1971-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (978_220_800_000, "2000-12-31T00:00:00.000Z"),
            (1_795_256_789_012, "2026-11-21T10:26:29.012Z"),
            (4_107_542_399_999, "2100-02-28T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (12_622_780_800_000, "2370-01-01T00:00:00.000Z"),
        ];
        for (ms, text) in table {
            assert_eq!(utc(ms), text);
        }
        // Whatever stands in a file, this ends.
        utc(u64::MAX);
    }
}
