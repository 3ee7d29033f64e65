//! Files and folders that appear complete or not at all.

use std::ffi::{CString, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::error::CheckpointError;

/// What stands between the name and the random end of a temporary file or folder.
const PARTIAL: &str = ".partial-";

/// Writes `bytes` to `path`: beside it first, then renamed onto it, both flushed to the disk.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    write_with(path, |out| out.write_all(bytes).map_err(CheckpointError::write(path)))
}

/// As [`write_file`], with the contents written by `fill`. Where that fails, `path` is as it was before and
/// nothing is left beside it.
pub(crate) fn write_with<E: From<CheckpointError>>(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> Result<(), E>,
) -> Result<(), E> {
    let failed = || CheckpointError::write(path);
    let (parent, name) = place(path)?;
    let mut temporary = tempfile::Builder::new()
        .prefix(&hidden_prefix(&name))
        .rand_bytes(8)
        // What the umask leaves of it, as for any new file.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(&parent)
        .map_err(failed())?;
    let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    fill(&mut out)?;
    out.flush().map_err(failed())?;
    drop(out);
    temporary.as_file().sync_all().map_err(failed())?;
    temporary.persist(path).map_err(|error| failed()(error.error))?;
    sync(&parent).map_err(failed())?;
    Ok(())
}

/// A folder that is filled under a hidden name beside its place and renamed onto it when it is complete.
///
/// Dropped without [`commit`](Self::commit), it disappears. One that a killed process left is removed when the
/// next one for the same place is made.
#[derive(Debug)]
pub struct StagedDir {
    staging: PathBuf,
    target: PathBuf,
    replace: bool,
    /// Held locked while this process lives: how the next one tells a stale folder from one in use.
    _lock: File,
}

impl StagedDir {
    /// A folder that will become `target`, which must not exist yet or be an empty folder.
    ///
    /// Missing parents are made. Errors where something is there already, and where the target is the mount
    /// point of another disk, onto which no folder can be renamed.
    pub fn new(target: &Path) -> Result<Self, CheckpointError> {
        Self::stage(target, false)
    }

    /// As [`new`](Self::new), but a folder that is there already, whatever it holds, stays until the new one is
    /// complete and is then replaced by it.
    pub fn replacing(target: &Path) -> Result<Self, CheckpointError> {
        Self::stage(target, true)
    }

    fn stage(target: &Path, replace: bool) -> Result<Self, CheckpointError> {
        // A link to a folder stays, and the folder itself is replaced.
        let target = match target.canonicalize() {
            Ok(real) => real,
            Err(_) => target.to_path_buf(),
        };
        let (parent, name) = place(&target)?;
        fs::create_dir_all(&parent).map_err(CheckpointError::write(&parent))?;
        check_target(&target, &parent, replace)?;
        remove_stale(&parent, &name).map_err(CheckpointError::write(&parent))?;
        let (staging, lock) = locked_folder(&parent, &name).map_err(CheckpointError::write(&target))?;
        Ok(Self { staging, target, replace, _lock: lock })
    }

    /// The folder to fill.
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Flushes everything to the disk and gives the folder its name.
    ///
    /// Errors where the target has meanwhile come to hold something that may not be replaced, or the disk fails;
    /// the target is then as it was.
    pub fn commit(self) -> Result<(), CheckpointError> {
        let failed = || CheckpointError::write(&self.target);
        let (parent, _) = place(&self.target)?;
        check_target(&self.target, &parent, self.replace)?;
        sync_tree(&self.staging).map_err(failed())?;
        let full = self.replace && fs::read_dir(&self.target).is_ok_and(|mut dir| dir.next().is_some());
        if full {
            // The old folder takes the hidden name, and goes when `self` is dropped.
            exchange(&self.staging, &self.target).map_err(failed())?;
        } else {
            // Replaces an empty folder, and fails on one that is not.
            fs::rename(&self.staging, &self.target).map_err(failed())?;
        }
        sync(&parent).map_err(failed())
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        // After a commit nothing, or the replaced folder, has this name. What cannot be removed now is removed
        // by the next stage for the same place.
        let _ = fs::remove_dir_all(&self.staging);
    }
}

/// The folder and the name of `path`; errors where it has none.
fn place(path: &Path) -> Result<(PathBuf, OsString), CheckpointError> {
    let invalid = |reason| CheckpointError::InvalidOutput { path: path.to_path_buf(), reason };
    let name = path.file_name().ok_or_else(|| invalid("the path has no name"))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_os_string()))
}

fn hidden_prefix(name: &OsString) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(PARTIAL);
    prefix
}

fn check_target(target: &Path, parent: &Path, replace: bool) -> Result<(), CheckpointError> {
    let path = || target.to_path_buf();
    let Ok(metadata) = target.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.is_dir() {
        return Err(CheckpointError::InvalidOutput {
            path: path(),
            reason: "something that is not a folder has this name",
        });
    }
    let occupied = fs::read_dir(target).map_err(CheckpointError::read(target))?.next().is_some();
    if occupied && !replace {
        return Err(CheckpointError::OutputNotEmpty { path: path() });
    }
    let device = parent.metadata().map_err(CheckpointError::read(parent))?.dev();
    if metadata.dev() != device {
        return Err(CheckpointError::InvalidOutput {
            path: path(),
            reason: "it is the mount point of another disk; name a folder inside it",
        });
    }
    Ok(())
}

/// A new folder beside the target, locked.
fn locked_folder(parent: &Path, name: &OsString) -> io::Result<(PathBuf, File)> {
    loop {
        let staging = tempfile::Builder::new()
            .prefix(&hidden_prefix(name))
            .rand_bytes(8)
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(parent)?
            .keep();
        // Another process may take the folder for stale before the lock is there: then make another.
        let Ok(lock) = File::open(&staging) else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) if staging.exists() => return Ok((staging, lock)),
            // A file system without locks: staging works, only nothing tells a stale folder there.
            Err(fs::TryLockError::Error(_)) => return Ok((staging, lock)),
            Ok(()) | Err(fs::TryLockError::WouldBlock) => {}
        }
    }
}

/// Removes staging folders for `name` whose process is gone.
fn remove_stale(parent: &Path, name: &OsString) -> io::Result<()> {
    for (entry, target) in partial(parent)? {
        if target == *name && entry.file_type()?.is_dir() {
            remove_if_stale(&entry.path());
        }
    }
    Ok(())
}

/// Removes what killed processes left in `dir` under hidden names: folders that were being filled or removed, and
/// temporary files, of all targets whose name `is_ours` accepts. A folder that is not there has none.
///
/// A folder in use is told by its lock; files have none, so only one process may write those of `is_ours`.
pub fn remove_leftovers(dir: &Path, is_ours: impl Fn(&str) -> bool) -> Result<(), CheckpointError> {
    if !dir.is_dir() {
        return Ok(());
    }
    let failed = || CheckpointError::read(dir);
    for (entry, target) in partial(dir).map_err(failed())? {
        if !target.to_str().is_some_and(&is_ours) {
            continue;
        }
        if entry.file_type().map_err(failed())?.is_dir() {
            remove_if_stale(&entry.path());
        } else {
            // As with folders: what cannot be removed is not in the way.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Removes the folder `path`, which disappears at once: a kill leaves no half of it under its name.
pub fn remove_dir(path: &Path) -> Result<(), CheckpointError> {
    let failed = || CheckpointError::write(path);
    let (parent, name) = place(path)?;
    let mut hidden = hidden_prefix(&name);
    hidden.push("removed");
    let hidden = parent.join(hidden);
    match fs::remove_dir_all(&hidden) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed()(error)),
        _ => fs::rename(path, &hidden).map_err(failed())?,
    }
    fs::remove_dir_all(&hidden).map_err(failed())
}

/// The entries of `dir` with a hidden temporary name, each with the name of what it was to become.
fn partial(dir: &Path) -> io::Result<Vec<(fs::DirEntry, OsString)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let target = name.to_str().and_then(|name| name.strip_prefix('.')?.rsplit_once(PARTIAL));
        if let Some(target) = target.map(|(target, _)| OsString::from(target)) {
            found.push((entry, target));
        }
    }
    Ok(found)
}

/// Removes a staging folder unless its process lives, which its lock tells. It may be another user's, or go away
/// meanwhile; either way it is not in the way.
fn remove_if_stale(path: &Path) {
    let stale = File::open(path).is_ok_and(|lock| lock.try_lock().is_ok());
    if stale {
        let _ = fs::remove_dir_all(path);
    }
}

/// Lets two folders change names, in one step where the file system can.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let (from, to) =
            (CString::new(new.as_os_str().as_bytes())?, CString::new(old.as_os_str().as_bytes())?);
        // SAFETY: both names end in NUL and live through the call.
        let result = unsafe {
            libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::RENAME_EXCHANGE)
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) {
            return Err(error);
        }
    }
    exchange_in_steps(new, old)
}

/// The same by three renames; a kill between them leaves the old folder under a hidden name.
fn exchange_in_steps(new: &Path, old: &Path) -> io::Result<()> {
    // Not the name of a stage: those are removed as stale.
    let mut name = OsString::from(".replaced");
    name.push(new.file_name().unwrap_or_default());
    let aside = old.with_file_name(name);
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(error);
    }
    fs::rename(&aside, new)
}

/// Flushes a file or the entries of a folder to the disk.
fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            sync(&entry.path())?;
        }
    }
    sync(dir)
}

#[cfg(test)]
mod tests;
