//! From text to tokens and back, and from messages to text.
//!
//! [`Tokenizer`] reads a model folder as it was published: the rules in `tokenizer.json`, the special tokens and the
//! chat template in the files beside it. [`ChatTemplate`] renders a conversation with that template, in an engine
//! that can do nothing but produce a bounded string. [`DecodeStream`] turns generated tokens into text as they come.

#[cfg(test)]
mod attacks;
mod builtins;
mod chat;
mod date;
mod decode;
mod engine;
mod error;
#[cfg(test)]
pub(crate) mod fixtures;
mod folder;
mod meter;
mod operators;
mod python;
mod tokenizer;

pub use chat::ChatTemplate;
pub use decode::DecodeStream;
pub use error::TextError;
pub use tokenizer::{Encoding, Tokenizer};
