//! Reading JSON that a stranger wrote: bounded, and strict about keys that appear twice.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::error::CheckpointError;

/// A JSON object as it stands: entries in file order, repeated keys kept.
pub(crate) struct Entries<V>(pub Vec<(String, V)>);

impl<V> Entries<V> {
    /// The entries by name; errors on the first key that appears twice in `path`.
    pub(crate) fn unique(self, path: &Path) -> Result<BTreeMap<String, V>, CheckpointError> {
        let mut map = BTreeMap::new();
        for (key, value) in self.0 {
            if map.contains_key(&key) {
                return Err(CheckpointError::DuplicateKey { path: path.to_path_buf(), key });
            }
            map.insert(key, value);
        }
        Ok(map)
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
            type Value = Entries<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

/// The bytes of the regular file at `path`, of which there may be at most `limit`.
///
/// # Errors
/// A file that is missing, larger, or no file: a pipe is not waited for.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let metadata = path.metadata().map_err(CheckpointError::read(path))?;
    // Checked before opening: a pipe would block.
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile { path: path.to_path_buf() });
    }
    let mut bytes = Vec::new();
    File::open(path)
        // One more than allowed, because the file may have grown since.
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(CheckpointError::read(path))?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::TooLarge {
            path: path.to_path_buf(),
            bytes: metadata.len().max(limit + 1),
            limit,
        });
    }
    Ok(bytes)
}

/// Parses the JSON of `path`; `what` it should be goes into the message.
pub(crate) fn parse<'de, T: Deserialize<'de>>(
    path: &Path,
    bytes: &'de [u8],
    what: &str,
) -> Result<T, CheckpointError> {
    serde_json::from_slice(bytes).map_err(|error| CheckpointError::InvalidJson {
        path: path.to_path_buf(),
        reason: format!("expected {what}: {error}"),
    })
}
