//! Dates for chat templates.

/// `strftime` in UTC and English for the codes that templates use; `None` names a code that is unknown here.
pub(super) fn strftime(format: &str, unix_seconds: u64) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day, day_of_year) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS[month as usize - 1];
    let weekday = DAYS[(days % 7) as usize];
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(&match chars.next()? {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'B' => month_name.to_string(),
            'b' | 'h' => month_name[..3].to_string(),
            'A' => weekday.to_string(),
            'a' => weekday[..3].to_string(),
            'j' => format!("{day_of_year:03}"),
            'H' => format!("{hour:02}"),
            'I' => format!("{hour12:02}"),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'p' => (if hour < 12 { "AM" } else { "PM" }).to_string(),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'Z' => "UTC".to_string(),
            '%' => "%".to_string(),
            '-' => match chars.next()? {
                'd' => day.to_string(),
                'm' => month.to_string(),
                'H' => hour.to_string(),
                'I' => hour12.to_string(),
                _ => return None,
            },
            _ => return None,
        });
    }
    Some(out)
}

/// Year, month, day and day of the year of a number of days since 1 January 1970.
fn civil_date(mut days: u64) -> (u64, u64, u64, u64) {
    // 400 Gregorian years have 146 097 days.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // 2024-02-29 13:05:09 UTC and 2000-12-31 00:00:00 UTC.
        let format = "%Y-%m-%d %d %B %b %A %a %j %H %I:%M:%S %p %-d %y %%";
        assert_eq!(
            strftime(format, 1_709_211_909).unwrap(),
            "2024-02-29 29 February Feb Thursday Thu 060 13 01:05:09 PM 29 24 %"
        );
        assert_eq!(strftime("%F %A %j", 978_220_800).unwrap(), "2000-12-31 Sunday 366");
        assert_eq!(strftime("%F", 0).unwrap(), "1970-01-01");
        assert_eq!(strftime("%Q", 0), None);
    }
}
