//! Room on a disk.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::error::CheckpointError;

/// Bytes an ordinary user may still write where `path` is or will be: on the file system of its nearest
/// existing ancestor.
pub fn free_bytes(path: &Path) -> Result<u64, CheckpointError> {
    let absolute = std::path::absolute(path).map_err(CheckpointError::read(path))?;
    let existing = absolute.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let name = CString::new(existing.as_os_str().as_bytes())
        .map_err(|error| CheckpointError::read(path)(error.into()))?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends in NUL and `stat` has room for the structure, which a result of 0 says is filled in.
    let stat = unsafe {
        if libc::statvfs(name.as_ptr(), stat.as_mut_ptr()) != 0 {
            return Err(CheckpointError::read(path)(io::Error::last_os_error()));
        }
        stat.assume_init()
    };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Errors where fewer than `bytes` are free at `path`, naming both numbers. That is not bad input.
pub fn require_free(path: &Path, bytes: u64) -> Result<(), CheckpointError> {
    let available = free_bytes(path)?;
    if available < bytes {
        return Err(CheckpointError::NotEnoughSpace { path: path.to_path_buf(), needed: bytes, available });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_path_that_does_not_exist_yet_has_the_room_of_its_ancestor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("not/yet");
        require_free(&path, 1).unwrap();
        assert!(free_bytes(&path).unwrap() > 0);
    }

    #[test]
    fn more_than_there_is_names_both_numbers() {
        let error = require_free(Path::new("/proc"), u64::MAX).unwrap_err();
        assert!(!error.is_bad_input());
        let message = error.to_string();
        assert!(message.contains("18446744073709551615 bytes needed"), "{message}");
        assert!(message.contains(" 0 free"), "{message}");
    }
}
