//! Text from tokens as they are generated.

use super::{TextError, Tokenizer};

/// Turns tokens into text one at a time. A piece is given out when its bytes form whole characters; all pieces
/// together are what [`Tokenizer::decode`] makes of all tokens.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Decoding restarts here. A decoder treats the first token of a text differently, so this lies before `done`
    /// and what lies between them decodes to something.
    from: usize,
    /// The tokens before this have been given out.
    done: usize,
    given: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), from: 0, done: 0, given: String::new() }
    }

    /// Takes the next token and returns the text that it completes, often empty.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        if self.tokenizer.token(id).is_some_and(|token| is_byte(&token)) {
            // A run of such tokens is text only if all of it is: what comes next may still change it.
            return Ok(String::new());
        }
        let before = self.tokenizer.decode(&self.ids[self.from..self.done], self.skip_special)?;
        let now = self.tokenizer.decode(&self.ids[self.from..], self.skip_special)?;
        // A replacement character at the end may be the first bytes of a character still to be completed.
        match now.strip_prefix(before.as_str()) {
            Some(piece) if !piece.is_empty() && !piece.ends_with('\u{fffd}') => {
                self.from = self.done;
                self.done = self.ids.len();
                self.given.push_str(piece);
                Ok(piece.to_string())
            }
            _ => Ok(String::new()),
        }
    }

    /// The text that is still held back, once no more tokens come.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String, TextError> {
        let whole = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(whole.strip_prefix(self.given.as_str()).unwrap_or_default().to_string())
    }
}

/// Whether a token stands for one byte, as sentencepiece writes them: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{folder, plain};
    use super::*;
    use serde_json::json;

    fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut stream = tokenizer.decode_stream(skip_special);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), tokenizer.decode(ids, skip_special).unwrap());
        pieces
    }

    #[test]
    fn characters_come_out_whole() {
        let tokenizer = plain();
        let ids = tokenizer.encode("a€b", false).unwrap().ids;
        assert_eq!(pieces(&tokenizer, &ids, true), ["a", "", "", "€", "b", ""]);
        // A euro sign that is never finished, alone and before more text.
        assert_eq!(pieces(&tokenizer, &ids[..3], true), ["a", "", "", "\u{fffd}"]);
        let broken = [&ids[..3], &ids[4..]].concat();
        assert_eq!(pieces(&tokenizer, &broken, true), ["a", "", "", "\u{fffd}b", ""]);
    }

    #[test]
    fn spaces_at_the_start_of_words_survive() {
        // A decoder that takes one space off the beginning of a text, as sentencepiece does.
        let dir = folder(false, &[("tokenizer_config.json", json!({"bos_token": "<s>"}))]);
        let path = dir.path().join("tokenizer.json");
        let words = ["<s>", "▁a", "▁", "<0xC3>", "<0xA9>", "b"];
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null,
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "WordLevel", "unk_token": "b",
                      "vocab": words.iter().enumerate().map(|(id, w)| (w.to_string(), id.into()))
                          .collect::<serde_json::Map<_, serde_json::Value>>()},
        });
        std::fs::write(path, json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(pieces(&tokenizer, &[0, 1, 2, 1, 0, 1], true), ["", "a", " ", " a", "", " a", ""]);
        assert_eq!(pieces(&tokenizer, &[1, 3, 4, 2, 2, 5], true), ["a", "", "", "é ", " ", "b", ""]);
        // Two bytes that are a character, then one that is none: this decoder gives up all three.
        assert_eq!(pieces(&tokenizer, &[1, 3, 4, 4, 5], true).concat(), "a\u{fffd}\u{fffd}\u{fffd}b");
        assert_eq!(pieces(&tokenizer, &[0, 1, 0, 1], false).concat(), "<s> a<s> a");
    }
}
