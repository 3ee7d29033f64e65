//! What can be wrong with data.

use std::io::ErrorKind;
use std::path::PathBuf;

use crate::text::TextError;

/// Why data could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// There is no such file.
    #[error("{}: no such file{hint}", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
        /// The nearest name in that folder, or nothing.
        hint: String,
    },
    /// The path is a folder.
    #[error("{}: this is a folder; name a data file{hint}", path.display())]
    Folder {
        /// The path as given.
        path: PathBuf,
        /// Data files in it, or nothing.
        hint: String,
    },
    /// The file cannot be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file's name does not end in a known format.
    #[error("{}: unknown format `{extension}`; known are .json, .jsonl, .csv, .tsv, .parquet and .txt{hint}", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its extension.
        extension: String,
        /// The nearest known one, or nothing.
        hint: String,
    },
    /// The file is not what its name says.
    #[error("{}: {place}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, row or record.
        place: String,
        /// What is wrong there.
        problem: String,
    },
    /// The file has no records.
    #[error("{}: this file holds no records", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A record lacks a field.
    #[error("{}: record {record} has no field `{field}`{hint}; its fields are: {found}", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The record's number, from 1.
        record: usize,
        /// The field's name.
        field: String,
        /// The nearest field there is, or nothing.
        hint: String,
        /// The fields there are.
        found: String,
    },
    /// A field has the wrong kind of value.
    #[error("{}: record {record}, field `{field}`: expected {expected}, found {found}", path.display())]
    WrongField {
        /// The file.
        path: PathBuf,
        /// The record's number, from 1.
        record: usize,
        /// The field's name, with the message's number where it is a property of a message.
        field: String,
        /// What should be there.
        expected: &'static str,
        /// What is there, shortened.
        found: String,
    },
    /// The chat template that a file's messages need is missing or invalid.
    #[error("{}: records of type `messages` need a chat template: {source}", path.display())]
    Template {
        /// The data file.
        path: PathBuf,
        /// What is wrong with the template.
        source: Box<TextError>,
    },
    /// A record's text could not be written or tokenised.
    #[error("{}: record {record}: {source}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// The record's number, from 1.
        record: usize,
        /// What went wrong.
        source: Box<TextError>,
    },
    /// The chat template hides where a message begins or ends.
    #[error("{}: record {record}: the chat template writes message {message} in a way that does not show for certain where it begins and ends (it may change, move, count or repeat messages); {help}", path.display())]
    OpaqueTemplate {
        /// The file.
        path: PathBuf,
        /// The record's number, from 1.
        record: usize,
        /// The message's number, from 1.
        message: usize,
        /// What can be done.
        help: String,
    },
    /// The tokenizer has no token to end an answer with.
    #[error("{}: record {record} needs an end-of-sequence token, and {} names none; set `eos_token` in its tokenizer_config.json", path.display(), tokenizer.display())]
    NoEndToken {
        /// The file.
        path: PathBuf,
        /// The record's number, from 1.
        record: usize,
        /// The tokenizer's folder.
        tokenizer: PathBuf,
    },
    /// Examples are longer than allowed, and cutting was not chosen.
    #[error("{}: record {record} has {tokens} tokens, more than sequence_len {limit}; {count} of {records} records are too long, the longest has {longest}: raise sequence_len, or choose on_truncation: drop, left, right or split", path.display())]
    TooLong {
        /// The file of the first record that is too long.
        path: PathBuf,
        /// Its number, from 1.
        record: usize,
        /// Its length.
        tokens: usize,
        /// The longest length allowed.
        limit: usize,
        /// How many records are too long.
        count: usize,
        /// How many records there are.
        records: usize,
        /// The length of the longest.
        longest: usize,
    },
    /// Nothing is left to learn from.
    #[error(
        "no supervised tokens: of {records} records, {without_supervised} examples have no answer to learn and {dropped} were dropped as too long"
    )]
    NothingSupervised {
        /// How many records were read.
        records: usize,
        /// How many examples had no supervised token.
        without_supervised: usize,
        /// How many were dropped for their length.
        dropped: usize,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Option(String),
}

impl DataError {
    /// Whether the user's files or options are wrong (exit code 2), as against anything else (exit code 1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            DataError::Read { source, .. } => matches!(
                source.kind(),
                ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::InvalidFilename
            ),
            DataError::Template { source, .. } | DataError::Text { source, .. } => source.is_bad_input(),
            _ => true,
        }
    }
}
