//! One safetensors file: memory-mapped, and checked as a whole before any tensor is handed out.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use super::dtype::{Dtype, DtypeError, to_f32};
use super::error::CheckpointError;
use super::json::Entries;
use crate::nearest::did_you_mean;

/// Longest header that the format allows, in bytes.
pub(crate) const MAX_HEADER: u64 = 100_000_000;
/// Most tensors a file may have; the largest mixtures of experts have some 100 000.
const MAX_TENSORS: usize = 1_000_000;
/// Most dimensions a tensor may have.
const MAX_DIMENSIONS: usize = 16;
/// The key of the header that is no tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";
/// Bytes of the header's length, with which the file begins.
pub(crate) const LENGTH_BYTES: usize = 8;

/// A safetensors file, memory-mapped.
///
/// Nothing may cut the file short while it is open: as with every memory map, that would kill the process.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies; `begin..end` are bytes of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    begin: usize,
    end: usize,
}

/// A tensor of an open file; cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Its elements, little-endian and row-major; not necessarily aligned.
    pub bytes: &'a [u8],
}

impl TensorRef<'_> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// The elements as f32. Errors where the dtype is no float.
    pub fn to_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        to_f32(self.dtype, self.bytes)
            .map_err(|source| CheckpointError::TensorDtype { tensor: self.name.to_string(), source })
    }

    /// The elements of a tensor of i64. Errors where it is of another type.
    pub fn to_i64(&self) -> Result<Vec<i64>, CheckpointError> {
        if self.dtype != Dtype::I64 {
            let source = DtypeError::NotConvertible(self.dtype);
            return Err(CheckpointError::TensorDtype { tensor: self.name.to_string(), source });
        }
        let words = self.bytes.chunks_exact(8);
        Ok(words.filter_map(|word| word.try_into().ok().map(i64::from_le_bytes)).collect())
    }
}

impl SafetensorsFile {
    /// Maps the file at `path` and checks its header in full: that it is JSON with every key once, that dtypes
    /// are known, that sizes agree with shapes, and that the tensors cover the rest of the file without overlap
    /// or hole. Every way it can be wrong is a variant of the error. Values are not looked at.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let metadata = path.metadata().map_err(CheckpointError::read(path))?;
        // Checked before opening: a pipe would block.
        if !metadata.is_file() {
            return Err(CheckpointError::NotAFile { path: path.to_path_buf() });
        }
        let file = File::open(path).map_err(CheckpointError::read(path))?;
        // SAFETY: the map is read-only and private to this value; that nobody cuts the file short meanwhile is
        // the documented condition of every user of a checkpoint.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(path))?;
        let (metadata, tensors) = check(path, &map, map.len())?;
        Ok(Self { path: path.to_path_buf(), map, metadata, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's `__metadata__`; empty where there is none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of that name. Errors where there is none, with the nearest name.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>, CheckpointError> {
        match self.tensors.get_key_value(name) {
            Some((name, entry)) => Ok(TensorRef {
                name,
                dtype: entry.dtype,
                shape: &entry.shape,
                bytes: &self.map[entry.begin..entry.end],
            }),
            None => Err(CheckpointError::TensorNotFound {
                path: self.path.clone(),
                tensor: name.to_string(),
                hint: did_you_mean(name, self.names()),
            }),
        }
    }

    /// SHA-256 of the file as it is on disk. Its pages are given back to the system on the way.
    pub(crate) fn sha256(&self) -> impl AsRef<[u8]> + use<> {
        const PIECE: usize = 8 << 20;
        let mut hash = Sha256::new();
        for (piece, bytes) in self.map.chunks(PIECE).enumerate() {
            hash.update(bytes);
            self.forget(piece * PIECE, bytes.len());
        }
        hash.finalize()
    }

    /// Lets the system take back the pages that hold a tensor's bytes; they are read from the file again when needed.
    /// Pages of a map count as the process's memory for as long as nobody else wants them.
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.forget(entry.begin, entry.end - entry.begin);
        }
    }

    fn forget(&self, begin: usize, length: usize) {
        // SAFETY: the map is shared and read-only, so a page that is dropped comes back from the file as it was. That
        // the system declines changes nothing but memory.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, length) };
    }
}

/// The header as it stands, before any check.
struct Header {
    metadata: Vec<Option<Entries<String>>>,
    tensors: Vec<(String, Info)>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: Vec::new(), tensors: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if key == METADATA_KEY {
                        header.metadata.push(map.next_value()?);
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

pub(super) type Checked = (BTreeMap<String, String>, BTreeMap<String, Entry>);

/// Metadata and tensors of the file at `path` of `length` bytes, of which `bytes` are the first, at least to the end of
/// the header.
pub(super) fn check(path: &Path, bytes: &[u8], length: usize) -> Result<Checked, CheckpointError> {
    if let Some(found) = recognise(bytes) {
        return Err(CheckpointError::NotSafetensors { path: path.to_path_buf(), found });
    }
    let Some((claimed, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(CheckpointError::TooShort { path: path.to_path_buf(), bytes: bytes.len() });
    };
    let claimed = u64::from_le_bytes(*claimed);
    if claimed > MAX_HEADER {
        return Err(CheckpointError::HeaderTooLong { path: path.to_path_buf(), claimed, limit: MAX_HEADER });
    }
    // At most `MAX_HEADER`, which fits.
    let Some(header) = rest.get(..claimed as usize) else {
        return Err(CheckpointError::HeaderPastEnd {
            path: path.to_path_buf(),
            claimed,
            available: length.saturating_sub(LENGTH_BYTES),
        });
    };
    let header = parse(path, header)?;
    if header.tensors.len() > MAX_TENSORS {
        return Err(CheckpointError::TooManyTensors {
            path: path.to_path_buf(),
            found: header.tensors.len(),
            limit: MAX_TENSORS,
        });
    }
    let metadata = match header.metadata.into_iter().flatten().next() {
        Some(entries) => entries.unique(path)?,
        None => BTreeMap::new(),
    };
    let mut entries = Vec::with_capacity(header.tensors.len());
    for (name, info) in header.tensors {
        let entry = check_tensor(path, &name, info)?;
        entries.push((name, entry));
    }
    let start = LENGTH_BYTES + claimed as usize;
    check_cover(path, &mut entries, length.saturating_sub(start))?;
    for (_, entry) in &mut entries {
        entry.begin += start;
        entry.end += start;
    }
    Ok((metadata, Entries(entries).unique(path)?))
}

/// What the file is if it begins like something that is often found in place of weights.
fn recognise(bytes: &[u8]) -> Option<&'static str> {
    const PICKLE: &str = "a Python pickle, which is never read; convert it to safetensors";
    const LOOKALIKES: [(&[u8], &str); 6] = [
        (b"version https://git-lfs", "a git-lfs pointer; fetch the file itself with `git lfs pull`"),
        (b"<!doctype", "a web page; the download went wrong, fetch the file again"),
        (b"<html", "a web page; the download went wrong, fetch the file again"),
        (
            b"pk\x03\x04",
            "a zip archive, probably a PyTorch pickle, which is never read; convert it to safetensors",
        ),
        (b"gguf", "a GGUF file; fetch the safetensors of the model"),
        (b"\x89hdf", "an HDF5 file; fetch the safetensors of the model"),
    ];
    // A valid file has zeros in bytes 4 to 8 of its header's length, and then the header. Text never has zeros there,
    // archives and pickles may.
    if bytes.get(4..=LENGTH_BYTES) == Some(b"\0\0\0\0{") {
        return None;
    }
    // Protocols 2 to 5, and an instruction, none of which is 0.
    if matches!(bytes, [0x80, 2..=5, 1..=255, ..]) {
        return Some(PICKLE);
    }
    LOOKALIKES
        .iter()
        .find(|(magic, _)| bytes.get(..magic.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(magic)))
        .map(|(_, found)| *found)
}

fn parse(path: &Path, header: &[u8]) -> Result<Header, CheckpointError> {
    let invalid = |reason: String| CheckpointError::InvalidHeader { path: path.to_path_buf(), reason };
    let text = str::from_utf8(header).map_err(|error| invalid(error.to_string()))?;
    if !text.starts_with('{') {
        return Err(invalid("it does not begin with `{`".to_string()));
    }
    let header: Header = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
    if header.metadata.len() > 1 {
        return Err(CheckpointError::DuplicateKey {
            path: path.to_path_buf(),
            key: METADATA_KEY.to_string(),
        });
    }
    Ok(header)
}

/// Checks a tensor by itself; its offsets stay relative to the end of the header.
fn check_tensor(path: &Path, name: &str, info: Info) -> Result<Entry, CheckpointError> {
    let tensor = || name.to_string();
    let path = || path.to_path_buf();
    let Info { dtype, shape, data_offsets: (begin, end) } = info;
    let Some(dtype) = Dtype::from_header_name(&dtype) else {
        return Err(CheckpointError::UnknownDtype { path: path(), tensor: tensor(), found: dtype });
    };
    if shape.len() > MAX_DIMENSIONS {
        return Err(CheckpointError::TooManyDimensions {
            path: path(),
            tensor: tensor(),
            found: shape.len(),
            limit: MAX_DIMENSIONS,
        });
    }
    let Some(expected) = byte_len(dtype, &shape) else {
        return Err(CheckpointError::SizeOverflow { path: path(), tensor: tensor(), shape });
    };
    if end.checked_sub(begin) != Some(expected) {
        return Err(CheckpointError::WrongSpan {
            path: path(),
            tensor: tensor(),
            dtype,
            shape,
            expected,
            begin,
            end,
        });
    }
    Ok(Entry { dtype, shape, begin, end })
}

/// Bytes of a tensor, or `None` where the product overflows.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |product, &length| product.checked_mul(length))
}

/// Checks that the tensors, in the order of their offsets, cover bytes `0..available` exactly.
fn check_cover(
    path: &Path,
    entries: &mut [(String, Entry)],
    available: usize,
) -> Result<(), CheckpointError> {
    entries.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    let mut expected = 0;
    for (name, entry) in entries.iter() {
        let (path, tensor, begin) = (path.to_path_buf(), name.clone(), entry.begin);
        if begin < expected {
            return Err(CheckpointError::Overlap { path, tensor, begin, expected });
        }
        if begin > expected {
            return Err(CheckpointError::Hole { path, tensor, begin, expected });
        }
        if entry.end > available {
            return Err(CheckpointError::TensorPastEnd { path, tensor, end: entry.end, available });
        }
        expected = entry.end;
    }
    if expected < available {
        return Err(CheckpointError::TrailingBytes { path: path.to_path_buf(), bytes: available - expected });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
