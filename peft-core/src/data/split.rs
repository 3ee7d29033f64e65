//! Setting validation records aside, and picking samples.

use super::{DataError, Example};
use crate::random::Stream;

/// Chooses validation records at random and returns the examples' indices as `(train, validation)`, both ascending.
/// `record_of` gives each example's record, so that the pieces of a record that was split stay on one side.
///
/// `val_set_size` is a fraction of the records when below 1 (at least one record, at most all but one) and otherwise
/// a whole number of them; 0 sets nothing aside.
///
/// # Errors
/// When `val_set_size` is negative, not finite, above 1 without being whole, or leaves no record for training.
pub fn split_validation(
    record_of: &[usize],
    val_set_size: f64,
    seed: u64,
) -> Result<(Vec<usize>, Vec<usize>), DataError> {
    let mut records = record_of.to_vec();
    records.dedup();
    let all = records.len();
    let size = if val_set_size == 0.0 {
        return Ok(((0..record_of.len()).collect(), Vec::new()));
    } else if val_set_size > 0.0 && val_set_size < 1.0 {
        ((all as f64 * val_set_size).round() as usize).clamp(1, all.saturating_sub(1).max(1))
    } else if val_set_size >= 1.0 && val_set_size.fract() == 0.0 {
        val_set_size as usize
    } else {
        let problem = "should be a fraction below 1 or a whole number of records";
        return Err(DataError::Option(format!("val_set_size {val_set_size} {problem}")));
    };
    if size >= all {
        let problem = format!("val_set_size {val_set_size} leaves none of {all} records for training");
        return Err(DataError::Option(problem));
    }
    Stream::new(seed, "validation split", "", &[]).shuffle(&mut records);
    records.truncate(size);
    records.sort_unstable();
    Ok((0..record_of.len()).partition(|&example| records.binary_search(&record_of[example]).is_err()))
}

/// At most `count` of the examples, evenly spread over them.
pub fn samples(examples: &[Example], count: usize) -> Vec<&Example> {
    let count = count.min(examples.len());
    (0..count).map(|i| &examples[i * examples.len() / count]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_example_is_on_one_side_and_pieces_stay_together() {
        let record_of = [0, 1, 1, 1, 2, 3, 3, 5];
        let (train, validation) = split_validation(&record_of, 2.0, 1).unwrap();
        let mut both = [train.clone(), validation.clone()].concat();
        both.sort_unstable();
        assert_eq!(both, (0..8).collect::<Vec<_>>());
        let mut held: Vec<usize> = validation.iter().map(|&example| record_of[example]).collect();
        held.dedup();
        assert_eq!(held.len(), 2);
        assert!(train.iter().all(|&example| !held.contains(&record_of[example])));
        assert_eq!(split_validation(&record_of, 2.0, 1).unwrap(), (train, validation));
    }

    #[test]
    fn sizes_are_fractions_or_counts() {
        let records: Vec<usize> = (0..100).collect();
        let size = |val_set_size| split_validation(&records, val_set_size, 3).map(|(_, held)| held.len());
        assert_eq!(size(0.0).unwrap(), 0);
        assert_eq!(size(0.05).unwrap(), 5);
        assert_eq!(size(0.001).unwrap(), 1);
        assert_eq!(size(0.999).unwrap(), 99);
        assert_eq!(size(1.0).unwrap(), 1);
        assert_eq!(size(40.0).unwrap(), 40);
        for wrong in [100.0, 1.5, -0.1, f64::NAN, f64::INFINITY] {
            assert!(size(wrong).unwrap_err().is_bad_input(), "{wrong}");
        }
        assert!(split_validation(&[0], 0.5, 3).is_err());
        let seeds = [1, 2].map(|seed| split_validation(&records, 10.0, seed).unwrap().1);
        assert_ne!(seeds[0], seeds[1]);
    }
}
