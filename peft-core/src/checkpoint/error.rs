//! Every way a checkpoint can be wrong, or fail to be read or written.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::dtype::{Dtype, DtypeError};
use super::hub::HubError;

/// What went wrong with a checkpoint: its files, its folder, its place on disk or on the hub.
#[derive(Debug, Error)]
#[allow(missing_docs)] // Fields are what the message beside them says.
#[non_exhaustive]
pub enum CheckpointError {
    // Reading any file.
    /// The operating system refused to read.
    #[error("{}: cannot read: {source}", path.display())]
    ReadFailed { path: PathBuf, source: io::Error },
    /// A folder, pipe or device stands where a file is expected.
    #[error("{}: not a regular file", path.display())]
    NotAFile { path: PathBuf },
    /// A text file is larger than anything of its kind.
    #[error("{}: {bytes} bytes; a file of this kind has at most {limit}", path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    /// A JSON file cannot be used as what it should be.
    #[error("{}: {reason}", path.display())]
    InvalidJson { path: PathBuf, reason: String },
    /// A JSON object has the same key twice, so that two readers may see two different values.
    #[error("{}: key `{key}` appears twice", path.display())]
    DuplicateKey { path: PathBuf, key: String },

    // The safetensors format.
    /// The file is recognisably something else.
    #[error("{}: not a safetensors file but {found}", path.display())]
    NotSafetensors { path: PathBuf, found: &'static str },
    /// Not even room for the length of the header.
    #[error("{}: {bytes} bytes are too few for a safetensors file; is it cut short?", path.display())]
    TooShort { path: PathBuf, bytes: usize },
    /// The header claims, or would need, more than the format allows.
    #[error("{}: the header claims {claimed} bytes; the format allows {limit}", path.display())]
    HeaderTooLong { path: PathBuf, claimed: u64, limit: u64 },
    /// The header does not fit into the file.
    #[error("{}: the header claims {claimed} bytes but {available} follow; is the file cut short?", path.display())]
    HeaderPastEnd { path: PathBuf, claimed: u64, available: usize },
    /// The header is no JSON object of tensors.
    #[error("{}: invalid header: {reason}", path.display())]
    InvalidHeader { path: PathBuf, reason: String },
    /// More tensors than any model has.
    #[error("{}: {found} tensors; at most {limit} are read", path.display())]
    TooManyTensors { path: PathBuf, found: usize, limit: usize },
    /// More dimensions than any tensor has.
    #[error("{}: tensor `{tensor}` has {found} dimensions; at most {limit} are read", path.display())]
    TooManyDimensions { path: PathBuf, tensor: String, found: usize, limit: usize },
    /// An element type outside the format, or one without whole bytes.
    #[error("{}: tensor `{tensor}` has dtype `{found}`, which is not supported", path.display())]
    UnknownDtype { path: PathBuf, tensor: String, found: String },
    /// The size of the shape is beyond any file.
    #[error("{}: tensor `{tensor}` has shape {shape:?}, whose size overflows", path.display())]
    SizeOverflow { path: PathBuf, tensor: String, shape: Vec<usize> },
    /// Shape and dtype need another number of bytes than the offsets span.
    #[error("{}: tensor `{tensor}`, {dtype} of shape {shape:?}, needs {expected} bytes but has offsets {begin}..{end}", path.display())]
    WrongSpan {
        path: PathBuf,
        tensor: String,
        dtype: Dtype,
        shape: Vec<usize>,
        expected: usize,
        begin: usize,
        end: usize,
    },
    /// Two tensors share bytes.
    #[error("{}: tensor `{tensor}` begins at byte {begin}, inside the tensor before it, which ends at {expected}", path.display())]
    Overlap { path: PathBuf, tensor: String, begin: usize, expected: usize },
    /// Bytes between two tensors belong to none.
    #[error("{}: tensor `{tensor}` begins at byte {begin}, leaving a hole after {expected}", path.display())]
    Hole { path: PathBuf, tensor: String, begin: usize, expected: usize },
    /// A tensor lies beyond the end of the file.
    #[error("{}: tensor `{tensor}` ends at byte {end} but the file has {available}; is it cut short?", path.display())]
    TensorPastEnd { path: PathBuf, tensor: String, end: usize, available: usize },
    /// Bytes after the last tensor belong to none.
    #[error("{}: {bytes} bytes after the last tensor belong to no tensor", path.display())]
    TrailingBytes { path: PathBuf, bytes: usize },
    /// No tensor of that name.
    #[error("{}: no tensor `{tensor}`{hint}", path.display())]
    TensorNotFound { path: PathBuf, tensor: String, hint: String },
    /// The tensor's values cannot be used as f32.
    #[error("tensor `{tensor}`: {source}")]
    TensorDtype { tensor: String, source: DtypeError },
    /// A dtype that a user named.
    #[error(transparent)]
    Dtype(#[from] DtypeError),

    // A model's folder.
    /// The folder does not exist or is none.
    #[error("{}: no such folder{hint}", path.display())]
    NoFolder { path: PathBuf, hint: String },
    /// Without a configuration it is no model.
    #[error("{}: no config.json; a model folder holds config.json and model.safetensors (or shards with an index)", dir.display())]
    NoConfig { dir: PathBuf },
    /// A configuration but no weights.
    #[error("{}: neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights { dir: PathBuf },
    /// Weights only as Python objects, which run code when they are read.
    #[error("{}: weights are there only as pickle ({file}); pickle is never read, convert it to safetensors (load it in Python and call save_pretrained)", dir.display())]
    PickleOnly { dir: PathBuf, file: String },
    /// An adapter where a model is expected.
    #[error("{}: this is an adapter (it holds adapter_config.json), not a model; name its base model here", dir.display())]
    IsAdapter { dir: PathBuf },
    /// A shard's name that is no plain path below the folder.
    #[error("{}: shard `{shard}` is not the name of a safetensors file inside the folder", index.display())]
    UnsafeShardName { index: PathBuf, shard: String },
    /// More shards than any model has.
    #[error("{}: {found} shards; at most {limit} are read", index.display())]
    TooManyShards { index: PathBuf, found: usize, limit: usize },
    /// The index names a file that is not there.
    #[error("{}: shard `{shard}` is not in the folder; is the download complete?{hint}", index.display())]
    ShardMissing { index: PathBuf, shard: String, hint: String },
    /// A link to a place outside the folder and its hub cache.
    #[error("{}: leads out of its folder, to {}; copy the file instead of linking it", path.display(), target.display())]
    LeadsOut { path: PathBuf, target: PathBuf },
    /// The index promises a tensor that its shard lacks.
    #[error("{}: tensor `{tensor}` is not in its shard `{shard}`{hint}", index.display())]
    TensorNotInShard { index: PathBuf, tensor: String, shard: String, hint: String },
    /// Two shards hold the tensor and the index does not say which counts.
    #[error("tensor `{tensor}` stands both in {} and in {}, and the index lists neither", first.display(), second.display())]
    AmbiguousTensor { tensor: String, first: PathBuf, second: PathBuf },

    // Writing.
    /// The operating system refused to write, for instance because the disk is full.
    #[error("{}: cannot write: {source}", path.display())]
    WriteFailed { path: PathBuf, source: io::Error },
    /// The same name twice among the tensors to write.
    #[error("{}: tensor `{tensor}` would be written twice", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    /// The name that the format keeps for its metadata.
    #[error("{}: a tensor cannot have the name `{tensor}`", path.display())]
    ReservedName { path: PathBuf, tensor: String },
    /// A computed tensor has not the size that was announced.
    #[error("{}: tensor `{tensor}` should have {expected} bytes but {found} were computed", path.display())]
    WrongLength { path: PathBuf, tensor: String, expected: usize, found: usize },
    /// The output folder holds something already.
    #[error("{}: the output folder exists and is not empty; choose another or remove it", path.display())]
    OutputNotEmpty { path: PathBuf },
    /// The output path is a file, or has no name.
    #[error("{}: cannot be an output folder: {reason}", path.display())]
    InvalidOutput { path: PathBuf, reason: &'static str },
    /// Not enough room.
    #[error("{}: {needed} bytes needed on this disk, {available} free", path.display())]
    NotEnoughSpace { path: PathBuf, needed: u64, available: u64 },

    /// A folder to upload holds more files than any model.
    #[error("{}: more than {limit} files", path.display())]
    TooManyFiles { path: PathBuf, limit: usize },

    /// The hub or its cache.
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl CheckpointError {
    /// Whether the user's files or flags are wrong (exit code 2), and not the machine or network (1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::ReadFailed { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::InvalidFilename
                    // A path with a NUL in it.
                    | io::ErrorKind::InvalidInput
            ),
            // A path that cannot be is a mistake; a disk that fails is not.
            Self::WriteFailed { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotADirectory
                    | io::ErrorKind::AlreadyExists
                    | io::ErrorKind::InvalidFilename
                    | io::ErrorKind::InvalidInput
            ),
            Self::DuplicateTensor { .. }
            | Self::ReservedName { .. }
            | Self::WrongLength { .. }
            | Self::NotEnoughSpace { .. } => false,
            Self::Dtype(error) | Self::TensorDtype { source: error, .. } => error.is_bad_input(),
            Self::Hub(error) => error.is_bad_input(),
            _ => true,
        }
    }

    /// Turns a failure to read `path` into an error; made for `map_err`.
    pub(crate) fn read(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::ReadFailed { path: path.to_path_buf(), source }
    }

    /// Turns a failure to write `path` into an error; made for `map_err`.
    pub(crate) fn write(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::WriteFailed { path: path.to_path_buf(), source }
    }
}
