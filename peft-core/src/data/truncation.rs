//! Examples that are longer than allowed, and the account of what became of the records.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{DataError, Example};

/// What happens to an example that is longer than `sequence_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTruncation {
    /// Nothing is trained; the error tells how many there are.
    Error,
    /// It is left out.
    Drop,
    /// Its beginning is cut off, a beginning-of-sequence token apart.
    Left,
    /// Its end is cut off.
    Right,
    /// It becomes several examples. Each later one begins with the beginning-of-sequence token if the text does, else
    /// with the last token of the one before, so that every supervised token is learnt exactly once.
    Split,
}

/// What became of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Records read.
    pub records: usize,
    /// Examples made of them.
    pub examples: usize,
    /// Tokens in the examples.
    pub tokens: usize,
    /// Tokens that the model learns to write.
    pub supervised_tokens: usize,
    /// Records that were cut on the left or right.
    pub truncated: usize,
    /// Records left out as too long.
    pub dropped: usize,
    /// Records that became several examples.
    pub split: usize,
    /// Tokens of the longest record, before cutting.
    pub longest: usize,
    /// Examples left out since they have nothing to learn.
    pub without_supervised: usize,
}

/// Gathers examples, cuts those that are too long and keeps the account.
#[derive(Debug)]
pub struct Collector {
    limit: usize,
    bos: Option<u32>,
    examples: Vec<Example>,
    record_of: Vec<usize>,
    report: Report,
    too_long: Option<TooLong>,
}

/// The first record that is too long, and how many are.
#[derive(Debug)]
struct TooLong {
    path: PathBuf,
    record: usize,
    tokens: usize,
    count: usize,
    longest: usize,
}

impl Collector {
    /// A collector of examples of at most `sequence_len` tokens. A first token that is `bos` stays first when an
    /// example is cut.
    ///
    /// # Errors
    /// When `sequence_len` is below 2, the shortest text in which one token predicts another.
    pub fn new(sequence_len: usize, bos: Option<u32>) -> Result<Self, DataError> {
        if sequence_len < 2 {
            return Err(DataError::Option(format!(
                "sequence_len is {sequence_len}, but at least 2 is needed"
            )));
        }
        Ok(Self {
            limit: sequence_len,
            bos,
            examples: Vec::new(),
            record_of: Vec::new(),
            report: Report::default(),
            too_long: None,
        })
    }

    /// Takes the example of the next record; `path` and `number` (from 1) serve errors.
    pub fn add(&mut self, example: Example, on_truncation: OnTruncation, path: &Path, number: usize) {
        self.report.records += 1;
        let tokens = example.ids.len();
        self.report.longest = self.report.longest.max(tokens);
        if tokens <= self.limit || example.supervised_tokens() == 0 {
            return self.push(example);
        }
        let has_bos = self.bos.is_some() && example.ids.first().copied() == self.bos;
        match on_truncation {
            OnTruncation::Error => {
                let first = TooLong { path: path.into(), record: number, tokens, count: 0, longest: 0 };
                let too_long = self.too_long.get_or_insert(first);
                too_long.count += 1;
                too_long.longest = too_long.longest.max(tokens);
            }
            OnTruncation::Drop => self.report.dropped += 1,
            OnTruncation::Right => {
                self.report.truncated += 1;
                self.push(piece(&example, 0..self.limit, false));
            }
            OnTruncation::Left => {
                self.report.truncated += 1;
                let keep = self.limit - usize::from(has_bos);
                self.push(piece(&example, tokens - keep..tokens, has_bos));
            }
            OnTruncation::Split => {
                self.report.split += 1;
                self.push(piece(&example, 0..self.limit, false));
                let mut start = if has_bos { self.limit } else { self.limit - 1 };
                while start < tokens {
                    let end = tokens.min(start + self.limit - usize::from(has_bos));
                    self.push(piece(&example, start..end, has_bos));
                    start = match has_bos {
                        true => end,
                        // The last token of a piece is the context of the next one, if there is a next one.
                        false if end < tokens => end - 1,
                        false => end,
                    };
                }
            }
        }
    }

    fn push(&mut self, example: Example) {
        let supervised = example.supervised_tokens();
        if supervised == 0 {
            self.report.without_supervised += 1;
            return;
        }
        self.report.examples += 1;
        self.report.tokens += example.ids.len();
        self.report.supervised_tokens += supervised;
        self.examples.push(example);
        self.record_of.push(self.report.records - 1);
    }

    /// The examples, the record of each, and the account.
    ///
    /// # Errors
    /// When a record was too long and should not have been, or when no example has a supervised token.
    pub fn finish(self) -> Result<(Vec<Example>, Vec<usize>, Report), DataError> {
        let report = self.report;
        if let Some(TooLong { path, record, tokens, count, longest }) = self.too_long {
            let (limit, records) = (self.limit, report.records);
            return Err(DataError::TooLong { path, record, tokens, limit, count, records, longest });
        }
        if self.examples.is_empty() {
            let Report { records, without_supervised, dropped, .. } = report;
            return Err(DataError::NothingSupervised { records, without_supervised, dropped });
        }
        Ok((self.examples, self.record_of, report))
    }
}

/// Part of an example, with its first token before it if `keep_first`.
fn piece(example: &Example, range: Range<usize>, keep_first: bool) -> Example {
    let first = usize::from(keep_first);
    let ids = [&example.ids[..first], &example.ids[range.clone()]].concat();
    let mut supervised = [&example.supervised[..first], &example.supervised[range]].concat();
    if let Some(first) = supervised.first_mut() {
        *first = false;
    }
    Example { ids, supervised }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mask(example: &Example) -> String {
        example.supervised.iter().map(|&flag| if flag { '1' } else { '0' }).collect()
    }

    /// Tokens 10, 11, …, after token 0; the last `answer` of them are supervised.
    fn long(tokens: u32, answer: usize) -> Example {
        let ids: Vec<u32> = [0].into_iter().chain(10..9 + tokens).collect();
        let supervised = (0..ids.len()).map(|at| at >= ids.len() - answer).collect();
        Example { ids, supervised }
    }

    fn collect(
        examples: Vec<Example>,
        limit: usize,
        bos: Option<u32>,
        policy: OnTruncation,
    ) -> Result<(Vec<Example>, Vec<usize>, Report), DataError> {
        let mut collector = Collector::new(limit, bos).unwrap();
        for (at, example) in examples.into_iter().enumerate() {
            collector.add(example, policy, Path::new("d.json"), at + 1);
        }
        collector.finish()
    }

    #[test]
    fn too_long_is_an_error_that_counts() {
        let error = collect(vec![long(3, 1), long(6, 1), long(9, 1)], 5, Some(0), OnTruncation::Error);
        assert_eq!(
            error.unwrap_err().to_string(),
            "d.json: record 2 has 6 tokens, more than sequence_len 5; 2 of 3 records are too long, the longest has 9: raise sequence_len, or choose on_truncation: drop, left, right or split"
        );
    }

    #[test]
    fn cutting_keeps_what_it_says() {
        let one = |policy| collect(vec![long(7, 4), long(3, 1)], 4, Some(0), policy).unwrap();
        let (examples, record_of, report) = one(OnTruncation::Drop);
        assert_eq!((examples.len(), record_of, report.dropped), (1, vec![1], 1));
        let (examples, _, report) = one(OnTruncation::Left);
        assert_eq!(
            (examples[0].ids.as_slice(), mask(&examples[0]).as_str()),
            ([0, 13, 14, 15].as_slice(), "0111")
        );
        assert_eq!((report.truncated, report.tokens, report.supervised_tokens, report.longest), (1, 7, 4, 7));
        let (examples, _, _) = one(OnTruncation::Right);
        assert_eq!(
            (examples[0].ids.as_slice(), mask(&examples[0]).as_str()),
            ([0, 10, 11, 12].as_slice(), "0001")
        );
    }

    #[test]
    fn splitting_teaches_every_token_once() {
        for (bos, expected) in [
            (Some(0), vec![vec![0, 10, 11, 12], vec![0, 13, 14, 15], vec![0, 16]]),
            (None, vec![vec![0, 10, 11, 12], vec![12, 13, 14, 15], vec![15, 16]]),
        ] {
            let (examples, record_of, report) =
                collect(vec![long(8, 7)], 4, bos, OnTruncation::Split).unwrap();
            let ids: Vec<Vec<u32>> = examples.iter().map(|example| example.ids.clone()).collect();
            assert_eq!(ids, expected);
            assert_eq!(examples.iter().map(mask).collect::<Vec<_>>(), ["0111", "0111", "01"]);
            assert_eq!((report.supervised_tokens, report.split, report.examples), (7, 1, 3));
            assert_eq!(record_of, [0, 0, 0]);
        }
        // A text that fits to the token is one piece fewer, not an empty one.
        let (examples, _, _) = collect(vec![long(7, 6)], 4, None, OnTruncation::Split).unwrap();
        assert_eq!(examples.iter().map(mask).collect::<Vec<_>>(), ["0111", "0111"]);
    }

    #[test]
    fn data_without_answers_is_refused() {
        let (examples, record_of, report) =
            collect(vec![long(3, 0), long(3, 1)], 4, Some(0), OnTruncation::Error).unwrap();
        assert_eq!((examples.len(), record_of, report.without_supervised), (1, vec![1], 1));
        let error = collect(vec![long(3, 0), long(9, 1)], 4, Some(0), OnTruncation::Drop).unwrap_err();
        let expected = "no supervised tokens: of 2 records, 1 examples have no answer to learn and 1 were dropped as too long";
        assert_eq!(error.to_string(), expected);
        assert!(Collector::new(1, None).unwrap_err().is_bad_input());
    }
}
