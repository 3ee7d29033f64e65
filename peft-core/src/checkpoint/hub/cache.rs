//! The cache that all tools around the hub share.
//!
//! A repository's folder `models--org--name` holds `blobs/ETAG` with the contents, `snapshots/COMMIT/FILE` with
//! links to them, and `refs/REVISION` with the commit that a branch or tag stood at.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::folder::{
    ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, file_names, read_index,
};
use crate::checkpoint::json::read_bounded;
use crate::checkpoint::write_file;

/// An adapter's weights.
pub(super) const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// One repository in the cache.
pub(super) struct RepoCache {
    cache: PathBuf,
    folder: String,
}

impl RepoCache {
    /// The place of `repo`, a valid name, whether it exists or not.
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        Self { cache: cache.to_path_buf(), folder: format!("models--{}", repo.replace('/', "--")) }
    }

    fn root(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    /// The folder of the files as of `commit`.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root().join("snapshots").join(commit)
    }

    /// The place of the contents with that `etag`.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root().join("blobs").join(etag)
    }

    /// Waits until no other process downloads that `etag`, and keeps them out while the result lives.
    pub(super) fn lock(&self, etag: &str) -> Result<File, CheckpointError> {
        let dir = self.cache.join(".locks").join(&self.folder);
        let path = dir.join(format!("{etag}.lock"));
        let locked = || {
            fs::create_dir_all(&dir)?;
            let file = File::options().create(true).append(true).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        locked().map_err(CheckpointError::write(&path))
    }

    /// Lets `file` of the snapshot be the contents with that `etag`.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), CheckpointError> {
        let path = self.snapshot(commit).join(file);
        let up = "../".repeat(2 + file.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        let linked = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match symlink(&target, &path) {
                // A link that leads nowhere any more.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&path)?;
                    symlink(&target, &path)
                }
                result => result,
            }
        };
        linked().map_err(CheckpointError::write(&path))
    }

    /// The commit that `revision` stood at when it was last asked for. A commit stands for itself.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let bytes = read_bounded(&self.root().join("refs").join(revision), 256).ok()?;
        let commit = str::from_utf8(&bytes).ok()?.trim();
        is_commit(commit).then(|| commit.to_string())
    }

    /// Remembers the commit at which `revision` stands.
    pub(super) fn remember(&self, revision: &str, commit: &str) -> Result<(), CheckpointError> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root().join("refs").join(revision);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(CheckpointError::write(parent))?;
        }
        write_file(&path, commit.as_bytes())
    }
}

/// Whether the text is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Files without which the snapshot is neither a model nor an adapter nor a task vector.
pub(super) fn missing_files(snapshot: &Path) -> Result<Vec<String>, CheckpointError> {
    // Following links: one that leads nowhere is a missing file.
    let has = |name: &str| snapshot.join(name).is_file();
    let mut needed = Vec::new();
    if has(ADAPTER_CONFIG_FILE) && !has(CONFIG_FILE) {
        needed.push(ADAPTER_WEIGHTS_FILE.to_string());
    } else if !has("task_vector.json") {
        needed.push(CONFIG_FILE.to_string());
        if has(INDEX_FILE) && !has(WEIGHTS_FILE) {
            let mut shards: Vec<String> = read_index(&snapshot.join(INDEX_FILE))?.into_values().collect();
            shards.sort();
            shards.dedup();
            needed.extend(shards);
        } else {
            needed.push(WEIGHTS_FILE.to_string());
        }
    }
    needed.retain(|name| !has(name));
    Ok(needed)
}

/// Names of the repositories in the cache.
pub(super) fn cached_repos(cache: &Path) -> Vec<String> {
    let names = file_names(cache).unwrap_or_default();
    names.iter().filter_map(|name| Some(name.strip_prefix("models--")?.replacen("--", "/", 1))).collect()
}
