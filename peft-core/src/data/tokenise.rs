//! A text with marked characters as tokens with a loss mask.

use std::path::Path;

use super::DataError;
use super::prompt::Prompt;
use crate::text::{TextError, Tokenizer};
use sha2::{Digest, Sha256};

/// A tokenised text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, whether the model learns to write it. Never the first one, which nothing predicts.
    pub supervised: Vec<bool>,
}

impl Example {
    /// How many tokens the model learns to write.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().filter(|&&flag| flag).count()
    }
}

/// SHA-256 of tokens and masks, in hexadecimal: what training sees of its data, whatever files, formats, tokenizer and
/// template it came from.
pub fn examples_sha256(examples: &[Example]) -> String {
    let mut hash = Sha256::new();
    for example in examples {
        hash.update((example.ids.len() as u64).to_le_bytes());
        for (id, supervised) in example.ids.iter().zip(&example.supervised) {
            hash.update(id.to_le_bytes());
            hash.update([u8::from(*supervised)]);
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Turns prompts into examples.
#[derive(Debug)]
pub struct Tokeniser<'a> {
    tokenizer: &'a Tokenizer,
    train_on_inputs: bool,
}

impl<'a> Tokeniser<'a> {
    /// With `train_on_inputs` every token is supervised, not only the marked ones.
    pub fn new(tokenizer: &'a Tokenizer, train_on_inputs: bool) -> Self {
        Self { tokenizer, train_on_inputs }
    }

    /// Tokenises a prompt as a whole. A token is supervised when it overlaps a marked character. If the text ends with
    /// an answer, it ends with one supervised end-of-sequence token, or with the stop token that a chat template wrote
    /// there. `path` and `number` (from 1) serve errors.
    ///
    /// # Errors
    /// When the tokenizer fails on the text, or has no end-of-sequence token where one is needed.
    pub fn example(&self, prompt: &Prompt, path: &Path, number: usize) -> Result<Example, DataError> {
        let encoding = self.tokenizer.encode(&prompt.text, true).map_err(|source: TextError| {
            DataError::Text { path: path.into(), record: number, source: Box::new(source) }
        })?;
        let mut ids = encoding.ids;
        let mut offsets = encoding.offsets;
        // Whether the tokenizer ends a text by itself makes no difference to what is learnt.
        let ends_itself = ids.len() > 1 && ids.last().copied() == self.tokenizer.eos();
        if ends_itself && offsets.last().is_some_and(|(start, end)| start == end) {
            offsets.pop();
            ids.pop();
        }
        let mut ranges = prompt.supervised.iter().peekable();
        let mut supervised: Vec<bool> = offsets
            .iter()
            .map(|&(start, end)| {
                while ranges.next_if(|range| range.end <= start).is_some() {}
                let overlaps = ranges.peek().is_some_and(|range| range.start < end);
                start < end && (overlaps || self.train_on_inputs)
            })
            .collect();

        if prompt.ends_with_answer {
            match self.closing_token(prompt, &ids, &offsets) {
                Some(at) => supervised[at] = true,
                None => {
                    let eos = self.tokenizer.eos().ok_or_else(|| DataError::NoEndToken {
                        path: path.into(),
                        record: number,
                        tokenizer: self.tokenizer.dir().into(),
                    })?;
                    ids.push(eos);
                    supervised.push(true);
                }
            }
        }
        if let Some(first) = supervised.first_mut() {
            *first = false;
        }
        Ok(Example { ids, supervised })
    }

    /// The index of a stop token that ends the text, white space after it aside.
    fn closing_token(&self, prompt: &Prompt, ids: &[u32], offsets: &[(usize, usize)]) -> Option<usize> {
        let text = prompt.text.trim_end().chars().count();
        let at = offsets.iter().rposition(|&(start, end)| start < end && start < text)?;
        self.tokenizer.stop_ids().contains(&ids[at]).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::*;
    use crate::text::fixtures::{chat, plain};
    use std::ops::Range;

    fn example(tokenizer: &Tokenizer, text: &str, supervised: Range<usize>, on_inputs: bool) -> Example {
        let prompt = Prompt { text: text.into(), supervised: vec![supervised], ends_with_answer: true };
        Tokeniser::new(tokenizer, on_inputs).example(&prompt, Path::new("d"), 1).unwrap()
    }

    fn mask(example: &Example) -> String {
        example.supervised.iter().map(|&flag| if flag { '1' } else { '0' }).collect()
    }

    #[test]
    fn a_token_across_the_border_belongs_to_the_answer() {
        let tokenizer = plain();
        let id = |token| tokenizer.id(token).unwrap();
        // "xa" + "b": the tokenizer joins a and b.
        let across = example(&tokenizer, "xab", 2..3, false);
        assert_eq!(across.ids, [0, id("x"), id("ab"), 1]);
        assert_eq!(mask(&across), "0011");
    }

    #[test]
    fn the_hash_tells_tokens_masks_and_borders_apart() {
        let example =
            |ids: &[u32], supervised: &[bool]| Example { ids: ids.into(), supervised: supervised.into() };
        // printf '\x01\0\0\0\0\0\0\0\x07\0\0\0\x01' | sha256sum
        let expected = "f6c8a4e61a91eb7f5ed4d901e5f74f1de17aea3190530d249c509a17642aa7f8";
        assert_eq!(examples_sha256(&[example(&[7], &[true])]), expected);
        let others = [
            vec![example(&[7], &[false])],
            vec![example(&[8], &[true])],
            vec![example(&[7, 7], &[true, true])],
            vec![example(&[7], &[true]), example(&[], &[])],
        ];
        assert!(others.iter().all(|other| examples_sha256(other) != expected));
    }

    #[test]
    fn the_end_is_learnt_once() {
        let tokenizer = plain();
        assert_eq!(mask(&example(&tokenizer, "x:y", 2..3, false)), "00011");
        assert_eq!(mask(&example(&tokenizer, "x:y", 2..3, true)), "01111");
        let written = example(&tokenizer, "x:y</s>", 2..7, false);
        assert_eq!((written.ids.last(), mask(&written).as_str()), (Some(&1), "00011"));
        // An empty answer is to stop at once.
        assert_eq!(mask(&example(&tokenizer, "x", 1..1, false)), "001");
    }

    #[test]
    fn a_stop_token_of_the_template_is_the_end() {
        let tokenizer = chat("");
        // <|im_start|> a <|im_end|> and a newline that nobody generates.
        let turn = example(&tokenizer, "<|im_start|>a<|im_end|>\n", 12..23, false);
        assert_eq!((mask(&turn).as_str(), turn.ids.len()), ("0110", 4));
        let bare = example(&tokenizer, "<|im_start|>a\n", 12..14, false);
        assert_eq!((mask(&bare).as_str(), bare.ids.last()), ("0111", Some(&3)));
    }

    #[test]
    fn an_end_token_is_needed() {
        let dir = crate::text::fixtures::folder(true, &[]);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let prompt = Prompt { text: "a".into(), supervised: vec![0..1], ends_with_answer: true };
        let error = Tokeniser::new(&tokenizer, false).example(&prompt, Path::new("d"), 1).unwrap_err();
        assert!(matches!(error, DataError::NoEndToken { record: 1, .. }));
    }
}
