//! Axes: where the round numbers are, and how they are written.

use crate::render;

/// What an axis counts, which decides what is round and how it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A number.
    Number,
    /// A number for which the exponent matters, as a learning rate.
    Scientific,
    /// How many, where thousands and millions are enough.
    Count,
    /// Bytes, in binary units.
    Bytes,
}

/// How many times the lowest value the highest must be for a logarithmic axis.
const WIDE: f64 = 20.0;

/// A linear or logarithmic axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// The value at the start.
    pub low: f64,
    /// The value at the end.
    pub high: f64,
    /// Whether equal factors have equal distances.
    pub log: bool,
    /// The round numbers on it.
    pub ticks: Vec<f64>,
    unit: Unit,
}

impl Axis {
    /// The steps axis, from `low` to `high` exactly.
    pub fn steps(low: f64, high: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        let ticks = round_numbers(low, high, 6.0, 1.0);
        Self { low, high, log: false, ticks, unit: Unit::Number }
    }

    /// An axis around values from `low` to `high` that begins and ends at round numbers; at 0 if `from_zero`.
    /// Logarithmic where `log` and the values allow it.
    pub fn around(low: f64, high: f64, unit: Unit, from_zero: bool, log: bool) -> Self {
        if log && low > 0.0 && high / low > WIDE {
            return Self::logarithmic(low, high, unit);
        }
        let low = if from_zero { low.min(0.0) } else { low };
        let flat = high - low <= 1e-9 * high.abs();
        let (low, high) = match flat {
            true if high == 0.0 => (0.0, 1.0),
            true => (low - 0.5 * low.abs(), high + 0.5 * high.abs()),
            false => (low, high),
        };
        let factor = if unit == Unit::Bytes { binary_factor(high) } else { 1.0 };
        let step = round_step((high - low) / 4.0 / factor) * factor;
        let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
        let count = (last - first).clamp(1.0, 20.0) as u32;
        let ticks = (0..=count).map(|i| (first + f64::from(i)) * step).collect();
        Self { low: first * step, high: last * step, log: false, ticks, unit }
    }

    /// From the 1, 2 or 5 times a power of ten below `low` to the one above `high`.
    fn logarithmic(low: f64, high: f64, unit: Unit) -> Self {
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let round = |exponents: &mut dyn Iterator<Item = i32>, digits: &[f64]| -> Vec<f64> {
            exponents.flat_map(|e| digits.iter().map(move |digit| digit * 10f64.powi(e))).collect()
        };
        let all = round(&mut (first..=last), &[1.0, 2.0, 5.0]);
        let start = all.iter().copied().filter(|tick| *tick <= low * 1.000_001).fold(all[0], f64::max);
        let end = all.iter().copied().filter(|tick| *tick >= high * 0.999_999).fold(f64::INFINITY, f64::min);
        let every = ((last - first) as usize).div_ceil(6).max(1);
        let ticks = match last - first {
            ..=3 => all,
            _ => round(&mut (first..=last).step_by(every), &[1.0]),
        };
        let ticks = ticks.into_iter().filter(|tick| (start..=end).contains(tick)).collect();
        Self { low: start, high: end, log: true, ticks, unit }
    }

    /// The place of `value`, 0 at the start and 1 at the end.
    pub fn place(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        share.clamp(0.0, 1.0)
    }

    /// How the round number `tick` is written on this axis.
    pub fn label(&self, tick: f64) -> String {
        let step = match self.ticks.as_slice() {
            [first, second, ..] if !self.log => second - first,
            _ => tick.abs(),
        };
        match self.unit {
            Unit::Bytes => render::bytes(tick.max(0.0).round() as u64).replace(".0 ", " "),
            Unit::Scientific => scientific(tick),
            Unit::Count => compact(tick),
            Unit::Number => plain(tick, step),
        }
    }
}

/// Round numbers from `low` to `high`, about `count` of them, no closer than `least`.
fn round_numbers(low: f64, high: f64, count: f64, least: f64) -> Vec<f64> {
    let step = round_step((high - low) / count).max(least);
    let first = (low / step).ceil();
    (0..20).map(|i| (first + f64::from(i)) * step).take_while(|tick| *tick <= high).collect()
}

/// The smallest of 1, 2, 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.max(f64::MIN_POSITIVE).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= step * 0.999_999).unwrap_or(step)
}

fn binary_factor(bytes: f64) -> f64 {
    let mut factor = 1.0;
    while bytes >= factor * 1024.0 {
        factor *= 1024.0;
    }
    factor
}

/// A number with the digits that tell neighbours `step` apart.
fn plain(value: f64, step: f64) -> String {
    let value = if value.abs() < step * 1e-6 { 0.0 } else { value };
    if value != 0.0 && (value.abs() >= 1e7 || step < 1e-4) {
        return scientific(value);
    }
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    match digits {
        0 if value >= 0.0 => render::count(value.round() as u64),
        _ => format!("{value:.digits$}"),
    }
}

/// As `20k`, `1.5M` or `7B`.
fn compact(value: f64) -> String {
    let units = [(1e9, "B"), (1e6, "M"), (1e3, "k")];
    let (factor, unit) = units.into_iter().find(|(factor, _)| value >= *factor).unwrap_or((1.0, ""));
    let digits = format!("{:.2}", value / factor);
    format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// As `3e-4`, with as few digits as the number has.
pub fn scientific(value: f64) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| axis.label(*tick)).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let loss = Axis::around(0.24, 3.61, Unit::Number, false, false);
        assert_eq!(labels(&loss), ["0", "1", "2", "3", "4"]);
        let accuracy = Axis::around(0.612, 0.688, Unit::Number, false, false);
        assert_eq!(labels(&accuracy), ["0.60", "0.62", "0.64", "0.66", "0.68", "0.70"]);
        let rate = Axis::around(0.0, 5e-3, Unit::Scientific, true, false);
        assert_eq!(labels(&rate), ["0", "2e-3", "4e-3", "6e-3"]);
        let memory = Axis::around(0.0, 1.5e9, Unit::Bytes, true, false);
        assert_eq!(labels(&memory), ["0 B", "512 MiB", "1 GiB", "1.5 GiB"]);
        let steps = Axis::steps(0.0, 400.0);
        assert_eq!(labels(&steps), ["0", "100", "200", "300", "400"]);
        assert_eq!(labels(&Axis::steps(1.0, 3.0)), ["1", "2", "3"]);
    }

    #[test]
    fn a_wide_range_is_logarithmic_and_a_single_value_has_room() {
        let norm = Axis::around(0.012, 30.0, Unit::Number, false, true);
        assert_eq!(labels(&norm), ["0.01", "0.1", "1", "10"]);
        assert_eq!((norm.low, norm.high), (0.01, 50.0));
        let parameters = Axis::around(35_136.0, 134_515_008.0, Unit::Count, false, true);
        assert_eq!(labels(&parameters), ["100k", "1M", "10M", "100M"]);
        let parameters = Axis::around(500.0, 1400.0, Unit::Count, false, true);
        assert_eq!(labels(&parameters), ["500", "1k", "1.5k"]);
        let loss = Axis::around(0.25, 10.3, Unit::Number, false, true);
        assert_eq!(labels(&loss), ["0.2", "0.5", "1", "2", "5", "10", "20"]);
        assert!((loss.place(2.0) - 0.5).abs() < 1e-12);
        let flat = Axis::around(2.0, 2.0, Unit::Number, false, true);
        assert!(flat.low < 2.0 && flat.high > 2.0 && !flat.log);
        assert!(Axis::around(0.0, 0.0, Unit::Number, true, true).high > 0.0);
    }

    #[test]
    fn small_numbers_keep_their_exponent() {
        assert_eq!(scientific(5e-3), "5e-3");
        assert_eq!(scientific(1.25e-4), "1.25e-4");
        assert_eq!(scientific(0.0), "0");
    }
}
