//! Where a chat template writes each message of a conversation.
//!
//! A template is a program: it may trim contents, drop the thoughts of earlier answers, move the system message, repeat
//! or count. So nothing is searched for in the text. A message's place is found by writing the conversation again with
//! that message's letters replaced by private ones, one for one: if the result, turned back, is the same text, then the
//! template treats these letters as it treats any, and where private ones stand, the message stands. What surrounds it,
//! header and end, is found by writing the conversation only up to there. Where this does not fit together, there is no
//! answer, and the caller refuses.

use std::cell::RefCell;
use std::ops::Range;

use serde_json::{Map, Value};

use crate::text::{ChatTemplate, TextError};

/// Private letters: the character with code `c` becomes the one with code `PRIVATE + c`.
const PRIVATE: u32 = 0xf0000;
/// What stands in for a content without letters.
const PLACEHOLDER: &str = "\u{100000}\u{100001}\u{100000}";
/// Properties of a message that are its text; everything else may steer the template.
const TEXTS: [&str; 6] = ["content", "reasoning_content", "thinking", "reasoning", "tool_calls", "text"];

/// A message's place in the text, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    /// What its author writes, without the token that ends it.
    pub(super) written: Range<usize>,
    /// The token that ends it, if there is one.
    pub(super) stop: Option<Range<usize>>,
}

/// Which letters are replaced.
#[derive(Clone, Copy, PartialEq)]
enum Letters {
    /// Whatever is not white space.
    All,
    /// Letters and digits outside `<…>`, for templates that look for tags in the contents or write them as JSON.
    Plain,
}

/// A message's outermost letters in a text, in bytes.
#[derive(Debug, Clone)]
struct Place {
    letters: Range<usize>,
    /// Whether text of the message can lie outside of its outermost letters.
    loose: bool,
}

/// A conversation as a template writes it.
pub(super) struct Turns<'a> {
    template: &'a ChatTemplate,
    variables: &'a Map<String, Value>,
    messages: &'a [Value],
    text: &'a str,
    /// Texts of the tokens that end a turn.
    stops: &'a [String],
    places: RefCell<Vec<Option<Option<Place>>>>,
}

impl<'a> Turns<'a> {
    /// `text` is what `template` makes of `messages` and `variables`, without a generation prompt.
    pub(super) fn new(
        template: &'a ChatTemplate,
        variables: &'a Map<String, Value>,
        messages: &'a [Value],
        text: &'a str,
        stops: &'a [String],
    ) -> Self {
        Self { template, variables, messages, text, stops, places: RefCell::new(vec![None; messages.len()]) }
    }

    /// The turn of the assistant's message `at`, from after the generation prompt through the token that ends it; `None`
    /// when the template does not show it.
    pub(super) fn answer(&self, at: usize) -> Option<Turn> {
        if let Some(turn) = self.answer_between_beginnings(at) {
            return Some(turn);
        }
        let end = self.end(at)?;
        let place = self.place(at)?;
        let start = self.after_header(at, &place)?;
        (start <= place.letters.start).then_some(Turn { written: start..end.written.end, stop: end.stop })
    }

    /// The content of message `at` through the token that ends it, without its header.
    pub(super) fn content(&self, at: usize) -> Option<Turn> {
        self.end(at)
    }

    /// An answer is what the text gains over the prompt it answers, if the template writes a conversation's beginning
    /// alike whatever follows.
    fn answer_between_beginnings(&self, at: usize) -> Option<Turn> {
        // A stop token that somebody wrote cannot be told from the template's own in this way.
        if self.holds_stop(&self.messages[at]) {
            return None;
        }
        let prompt = self.render(&self.messages[..at], true).ok()?;
        let turn = self.render(&self.messages[..=at], false).ok()?;
        if !(self.text.starts_with(&prompt) && self.text.starts_with(&turn) && prompt.len() <= turn.len()) {
            return None;
        }
        let mut end = turn.len();
        let mut stop = None;
        // Of several stop tokens in a row the first one ends the turn.
        while let Some(found) = self.stop_at_end(&self.text[prompt.len()..end]) {
            let start = prompt.len() + found.start;
            stop = Some(start..prompt.len() + found.end);
            end = start;
        }
        Some(Turn { written: prompt.len()..end, stop })
    }

    fn stop_at_end(&self, text: &str) -> Option<Range<usize>> {
        let trimmed = text.trim_end();
        let length =
            self.stops.iter().filter(|stop| trimmed.ends_with(stop.as_str())).map(String::len).max()?;
        Some(trimmed.len() - length..trimmed.len())
    }

    /// From the first letter of message `at` to its end.
    fn end(&self, at: usize) -> Option<Turn> {
        let place = self.place(at)?;
        if place.loose && self.holds_stop(&self.messages[at]) {
            return None;
        }
        let beginning = &self.messages[..=at];
        let (rendered, alone) = self.locate(beginning, at, false)?;
        let closing = &rendered[alone.letters.end..];
        let after = &self.text[place.letters.end..];
        let whole = after.starts_with(closing);
        let closing = if whole { closing } else { common_prefix(closing, after) };
        let first = |stop: &'a String| closing.find(stop.as_str()).map(|start| (start, stop.len()));
        let found =
            self.stops.iter().filter_map(first).min_by_key(|&(start, length)| (start, usize::MAX - length));
        let offset = place.letters.end;
        match found {
            Some((start, length)) => Some(Turn {
                written: place.letters.start..offset + start,
                stop: Some(offset + start..offset + start + length),
            }),
            None if whole => Some(Turn { written: place.letters.start..offset + closing.len(), stop: None }),
            None => None,
        }
    }

    /// Where the generation prompt before the answer `at` ends.
    fn after_header(&self, at: usize, place: &Place) -> Option<usize> {
        if let Some((before, prompt)) = self.header_after_previous(at) {
            let gap = self.text.get(before..place.letters.start)?;
            if gap.starts_with(&prompt) {
                return Some(before + prompt.len());
            }
            // The prompt may suggest more than the text has there, such as an empty thought.
            let common = common_prefix(gap, &prompt).len();
            if gap[common..].trim().is_empty() {
                return Some(before + common);
            }
        }
        let header = self.generation_prompt(at)?;
        let earlier = (0..at).rev().find_map(|at| self.place(at)).map_or(0, |place| place.letters.end);
        let gap = self.text.get(earlier..place.letters.start)?;
        Some(earlier + gap.rfind(&header)? + header.len())
    }

    /// Where the message before `at` ends, and what a prompt for an answer has after it.
    fn header_after_previous(&self, at: usize) -> Option<(usize, String)> {
        let previous = at.checked_sub(1)?;
        let place = self.place(previous)?;
        let (prompt, alone) = self.locate(&self.messages[..at], previous, true)?;
        Some((place.letters.end, prompt[alone.letters.end..].to_string()))
    }

    /// What asking for an answer adds to a text; never empty.
    fn generation_prompt(&self, at: usize) -> Option<String> {
        let ends = [at.max(1), at + 1];
        ends.into_iter().find_map(|end| {
            let plain = self.render(&self.messages[..end], false).ok()?;
            let prompt = self.render(&self.messages[..end], true).ok()?;
            prompt.strip_prefix(&plain).filter(|added| !added.is_empty()).map(str::to_string)
        })
    }

    /// The place of message `at` in the text.
    fn place(&self, at: usize) -> Option<Place> {
        if let Some(known) = &self.places.borrow()[at] {
            return known.clone();
        }
        let place = self.locate_in(self.text, self.messages, at, false);
        self.places.borrow_mut()[at] = Some(place.clone());
        place
    }

    /// The text of `messages` and the place of message `at` in it.
    fn locate(&self, messages: &[Value], at: usize, prompt: bool) -> Option<(String, Place)> {
        let text = self.render(messages, prompt).ok()?;
        let place = self.locate_in(&text, messages, at, prompt)?;
        Some((text, place))
    }

    fn locate_in(&self, text: &str, messages: &[Value], at: usize, prompt: bool) -> Option<Place> {
        if text.chars().any(|c| c as u32 >= PRIVATE) {
            return None;
        }
        for letters in [Letters::All, Letters::Plain] {
            let mut replaced = messages.to_vec();
            if !replace_letters(&mut replaced[at], letters) {
                continue;
            }
            let Ok(private) = self.render(&replaced, prompt) else { continue };
            if let Some(found) = private_letters(&private, text) {
                let loose = letters == Letters::Plain;
                return found.map(|letters| Place { letters, loose });
            }
        }
        self.around_placeholder(text, messages, at, prompt)
    }

    /// The place of a content without letters: what changes when it is replaced as a whole.
    fn around_placeholder(&self, text: &str, messages: &[Value], at: usize, prompt: bool) -> Option<Place> {
        let mut replaced = messages.to_vec();
        let content = replaced[at].get_mut("content")?;
        if !content.as_str()?.chars().all(|c| !c.is_alphanumeric()) {
            return None;
        }
        *content = PLACEHOLDER.into();
        let rendered = self.render(&replaced, prompt).ok()?;
        let (before, after) = rendered.split_once(PLACEHOLDER)?;
        if after.contains(PLACEHOLDER) || text.len() < before.len() + after.len() {
            return None;
        }
        let content = text.strip_prefix(before)?.strip_suffix(after)?;
        Some(Place { letters: before.len()..before.len() + content.len(), loose: false })
    }

    fn holds_stop(&self, message: &Value) -> bool {
        match message {
            Value::String(text) => self.stops.iter().any(|stop| text.contains(stop.as_str())),
            Value::Array(items) => items.iter().any(|item| self.holds_stop(item)),
            Value::Object(items) => items.values().any(|item| self.holds_stop(item)),
            _ => false,
        }
    }

    fn render(&self, messages: &[Value], prompt: bool) -> Result<String, TextError> {
        self.template.render(messages, prompt, self.variables)
    }
}

/// Replaces letters in the texts of a message; says whether there were any.
fn replace_letters(message: &mut Value, letters: Letters) -> bool {
    let Value::Object(message) = message else { return false };
    let mut any = false;
    for (_, value) in message.iter_mut().filter(|(key, _)| TEXTS.contains(&key.as_str())) {
        any |= replace_inside(value, letters);
    }
    any
}

fn replace_inside(value: &mut Value, letters: Letters) -> bool {
    match value {
        Value::String(text) => {
            let replaced = private(text, letters);
            let any = replaced != *text;
            *text = replaced;
            any
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, item| any | replace_inside(item, letters)),
        Value::Object(items) => {
            // Kinds and ids are for the template to compare.
            let texts = items.iter_mut().filter(|(key, _)| !["type", "id"].contains(&key.as_str()));
            texts.fold(false, |any, (_, item)| any | replace_inside(item, letters))
        }
        _ => false,
    }
}

fn private(text: &str, letters: Letters) -> String {
    let replaced = |c: char| match letters {
        Letters::All => !c.is_whitespace(),
        Letters::Plain => c.is_alphanumeric(),
    };
    let mut tag_end = 0;
    text.char_indices()
        .map(|(at, c)| {
            if letters == Letters::Plain && at >= tag_end && c == '<' {
                let tag = |end: &usize| !text[at..at + end].contains(char::is_whitespace);
                tag_end = text[at..].find('>').filter(tag).map_or(tag_end, |end| at + end + 1);
            }
            let code = c as u32;
            match at >= tag_end && replaced(c) && code < 0xfffe {
                true => char::from_u32(PRIVATE + code).unwrap_or(c),
                false => c,
            }
        })
        .collect()
}

/// The bytes of `text` from the first to the last letter that is private in `replaced`, if the two are the same text
/// apart from that. `Some(None)` when nothing is private: the message is not shown.
fn private_letters(replaced: &str, text: &str) -> Option<Option<Range<usize>>> {
    let mut range: Option<Range<usize>> = None;
    let mut original = text.char_indices();
    for c in replaced.chars() {
        let (at, expected) = original.next()?;
        if c == expected {
            continue;
        }
        if c as u32 != PRIVATE + expected as u32 {
            return None;
        }
        let end = at + expected.len_utf8();
        range = Some(range.map_or(at, |range| range.start)..end);
    }
    original.next().is_none().then_some(range)
}

fn common_prefix<'t>(a: &'t str, b: &str) -> &'t str {
    let equal = a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y);
    let end = equal.map_or(a.len().min(b.len()), |((at, _), _)| at);
    &a[..end]
}
