//! The base that an adapter of an own format belongs to: the hash of the tensors that it was made on.

use super::error::AdapterError;
use crate::checkpoint::{Checkpoint, hex};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;

/// A fingerprint of the tensors `names` of a checkpoint: SHA-256 over name, type, shape and bytes of each, in the order
/// of their names. It does not depend on how they are split into files.
///
/// # Errors
/// A tensor that is not there.
pub fn tensors_sha256(checkpoint: &Checkpoint, names: &[String]) -> Result<String, AdapterError> {
    let mut names: Vec<&String> = names.iter().collect();
    names.sort();
    let digest = |name: &&String| {
        let tensor = checkpoint.tensor(name)?;
        let bytes = hex(&Sha256::digest(tensor.bytes));
        Ok(format!("{bytes}  {name} {} {:?}\n", tensor.dtype.header_name(), tensor.shape))
    };
    let lines = names.par_iter().map(digest).collect::<Result<Vec<String>, AdapterError>>()?;
    Ok(hex(&Sha256::digest(lines.concat())))
}

/// Sees that the tensors `names` of `base` have the fingerprint `expected` of [`tensors_sha256`]. `adapter` is the
/// adapter's folder, for the message.
///
/// # Errors
/// [`AdapterError::WrongBase`], or a tensor that is not there.
pub fn require_base(
    adapter: &Path,
    base: &Checkpoint,
    names: &[String],
    expected: &str,
) -> Result<(), AdapterError> {
    let found = tensors_sha256(base, names)?;
    match found == expected {
        true => Ok(()),
        false => Err(AdapterError::WrongBase {
            adapter: adapter.to_path_buf(),
            base: base.dir().to_path_buf(),
            expected: expected.to_string(),
            found,
        }),
    }
}
