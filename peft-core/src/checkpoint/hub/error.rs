//! What can go wrong between a model's name on the hub and its files on disk.

use std::path::PathBuf;

use thiserror::Error;

/// A failure of the hub, of the way to it, or of its cache. No message ever holds the token.
#[derive(Debug, Error)]
#[allow(missing_docs)] // Fields are what the message beside them says.
#[non_exhaustive]
pub enum HubError {
    /// The name is no folder and cannot be a repository's.
    #[error("`{base}` is neither a folder nor the name of a model on the hub, such as `org/name`")]
    InvalidName { base: String },
    /// A revision with characters that none has.
    #[error("`{revision}` cannot be a branch, tag or commit on the hub")]
    InvalidRevision { revision: String },
    /// The endpoint is no address.
    #[error(
        "the hub's endpoint must be http:// or https:// with a host and without user name; found `{endpoint}`"
    )]
    InvalidEndpoint { endpoint: String },
    /// The token has characters that no token has.
    #[error("the hub's token holds characters that cannot be sent; check HF_TOKEN or the token file")]
    InvalidToken,
    /// The cache lacks what offline use needs.
    #[error("{repo}: no such folder here, and revision `{revision}` is not complete in {}: missing {missing}; download it once without --offline{hint}", cache.display())]
    NotCached { repo: String, revision: String, cache: PathBuf, missing: String, hint: String },
    /// The hub refuses, with a token.
    #[error(
        "the hub denies access to {repo} (HTTP {status}): accept its licence on its page, and see that the token may read it"
    )]
    AccessDenied { repo: String, status: u16 },
    /// The hub refuses, without a token.
    #[error(
        "the hub denies access to {repo} (HTTP {status}): it does not exist, or is private or gated; check the name, set HF_TOKEN, and accept the licence on its page{hint}"
    )]
    TokenNeeded { repo: String, status: u16, hint: String },
    /// No such repository.
    #[error("{repo}: no such model on the hub, and no such folder here{hint}")]
    RepoNotFound { repo: String, hint: String },
    /// No such branch, tag or commit.
    #[error("{repo}: no revision `{revision}`")]
    RevisionNotFound { repo: String, revision: String },
    /// A file that the index names is not in the repository.
    #[error("{repo}: no file `{file}` in the repository")]
    FileNotFound { repo: String, file: String },
    /// Weights only as Python objects.
    #[error(
        "{repo}: weights are there only as pickle ({file}); pickle is never read, use a revision with safetensors"
    )]
    PickleOnly { repo: String, file: String },
    /// Neither a model nor an adapter.
    #[error("{repo}: the repository holds no safetensors")]
    NoWeights { repo: String },
    /// No connection.
    #[error("cannot reach {host}: {reason}; with the model in the cache, --offline works without network")]
    Unreachable { host: String, reason: String },
    /// The connection broke, and again after several tries.
    #[error("{file}: the download broke off: {reason}; run again to go on from there")]
    Interrupted { file: String, reason: String },
    /// A push where no connection may be made.
    #[error("{repo}: nothing can be uploaded offline (--offline or HF_HUB_OFFLINE)")]
    Offline { repo: String },
    /// A push by nobody.
    #[error(
        "{repo}: uploading needs a token that may write; set HF_TOKEN, or log in so that there is a token file"
    )]
    PushNeedsToken { repo: String },
    /// The name cannot be a repository to push to.
    #[error("`{repo}` is no repository's name, such as `org/name`")]
    InvalidTarget { repo: String },
    /// The token is not one that the hub knows.
    #[error("{repo}: the hub refuses the token (HTTP 401){reason}; check HF_TOKEN or the token file")]
    TokenRefused { repo: String, reason: String },
    /// The token may not write.
    #[error("the token may not write to {repo} (HTTP 403){reason}: it needs write access there")]
    WriteDenied { repo: String, reason: String },
    /// No repository to push to.
    #[error("{repo}: no such model on the hub that this token can see; --create makes it")]
    RepoMissing { repo: String },
    /// No branch to push to.
    #[error("{repo}: no branch `{revision}`; --create makes it")]
    BranchMissing { repo: String, revision: String },
    /// A public repository where a private one was asked for.
    #[error(
        "{repo}: the repository is public, and --private was given; make it private on its page, or leave the flag out"
    )]
    PublicRepo { repo: String },
    /// Somebody else's commit came between.
    #[error(
        "{repo}: branch `{revision}` moved meanwhile (HTTP 412), and nothing was changed by this try; look at what is there, and run again"
    )]
    BranchMoved { repo: String, revision: String },
    /// The storage of large files takes one not.
    #[error("{file}: the hub's storage refuses it (code {status}): {reason}")]
    ObjectRefused { file: String, status: u16, reason: String },
    /// A status that means no, or not now.
    #[error("{url}: HTTP {status}{reason}")]
    Rejected { url: String, status: u16, reason: String },
    /// The connection was lost, and again after several tries.
    #[error(
        "{what}: the connection to {host} failed: {reason}; run again, large files that have arrived are not sent twice"
    )]
    SendFailed { what: String, host: String, reason: String },
    /// An answer that is neither success nor one of the known refusals.
    #[error("{url}: HTTP {status}")]
    UnexpectedStatus { url: String, status: u16 },
    /// An answer that makes no sense.
    #[error("{url}: unusable answer: {reason}")]
    InvalidResponse { url: String, reason: String },
    /// The file that arrived is not the file that was announced.
    #[error("{file}: expected {expected}, received {found}; run again to download it anew")]
    Corrupt { file: String, expected: String, found: String },
}

impl HubError {
    /// Whether a name, flag, token or cache of the user is wrong, and not the network or the hub.
    pub fn is_bad_input(&self) -> bool {
        !matches!(
            self,
            Self::Unreachable { .. }
                | Self::Interrupted { .. }
                | Self::UnexpectedStatus { .. }
                | Self::InvalidResponse { .. }
                | Self::Corrupt { .. }
                | Self::BranchMoved { .. }
                | Self::ObjectRefused { .. }
                | Self::Rejected { .. }
                | Self::SendFailed { .. }
        )
    }
}
