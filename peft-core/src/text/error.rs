//! What can be wrong with a tokenizer or a chat template.

use std::path::PathBuf;

/// Why text could not be tokenised, decoded or rendered.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The folder has no `tokenizer.json`.
    #[error("{}: no tokenizer.json in this folder{hint}", dir.display())]
    NoTokenizer {
        /// The model folder.
        dir: PathBuf,
        /// What to do about it, or nothing.
        hint: String,
    },
    /// A file could not be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is far larger than such a file can sensibly be.
    #[error("{}: {bytes} bytes, but at most {limit} are expected here", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size accepted.
        limit: u64,
    },
    /// A file is not valid UTF-8 or JSON, or a key in it has the wrong kind of value.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the key or the position.
        problem: String,
    },
    /// A configuration names a special token that the vocabulary lacks.
    #[error("{}: {role} is `{token}`, which is not in the vocabulary of tokenizer.json{hint}", path.display())]
    UnknownSpecialToken {
        /// The file that names the token.
        path: PathBuf,
        /// Its role, for example `eos_token`.
        role: &'static str,
        /// The token's text.
        token: String,
        /// The nearest token there is, or nothing.
        hint: String,
    },
    /// The tokenizer could not encode or decode.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// The model folder has no chat template.
    #[error("{}: this tokenizer has no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json){hint}", dir.display())]
    NoTemplate {
        /// The model folder.
        dir: PathBuf,
        /// What was found instead, or nothing.
        hint: String,
    },
    /// The chat template is not valid Jinja.
    #[error("the chat template does not parse: {0}")]
    TemplateSyntax(String),
    /// The chat template stopped with its own message.
    #[error("the chat template refuses these messages: {0}")]
    TemplateRefused(String),
    /// The chat template failed while rendering.
    #[error("the chat template failed: {0}")]
    TemplateFailed(String),
    /// The chat template runs too long or writes too much.
    #[error("the chat template was stopped: it exceeds the limit of {0}")]
    TemplateLimit(String),
}

impl TextError {
    /// Whether the user's files are wrong (exit code 2), as against anything else (exit code 1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            TextError::Read { source, .. } => source.kind() == std::io::ErrorKind::PermissionDenied,
            _ => true,
        }
    }
}
