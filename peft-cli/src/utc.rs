//! Times as dates in UTC.

/// Date and minute, as `2026-01-31 12:05 UTC`.
pub fn minute(unix_seconds: u64) -> String {
    let [hours, minutes, _] = clock(unix_seconds);
    format!("{} {hours:02}:{minutes:02} UTC", date(unix_seconds / 86_400))
}

/// Date and second in ISO 8601, as `2026-01-31T12:05:09+00:00`.
pub fn iso(unix_seconds: u64) -> String {
    let [hours, minutes, seconds] = clock(unix_seconds);
    format!("{}T{hours:02}:{minutes:02}:{seconds:02}+00:00", date(unix_seconds / 86_400))
}

fn clock(unix_seconds: u64) -> [u64; 3] {
    [unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60]
}

/// Days since 1970 as a date of the proleptic Gregorian calendar, by years that begin in March.
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(minute(0), "1970-01-01 00:00 UTC");
        assert_eq!(minute(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(minute(1_767_225_599), "2025-12-31 23:59 UTC");
        assert_eq!(iso(1_767_225_599), "2025-12-31T23:59:59+00:00");
    }
}
