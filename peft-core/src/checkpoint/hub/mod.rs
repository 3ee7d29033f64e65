//! From what a user calls a model to its folder: a path as it is, a hub id by way of the cache.
//!
//! The hub's protocol: `/api/models/ID/revision/REV` names the commit and its files, and
//! `/ID/resolve/COMMIT/FILE` gives each, with its hash in a header and, for large ones, by a redirect to another
//! host. See <https://huggingface.co/docs/huggingface_hub/guides/manage-cache> for the cache's layout.

mod cache;
mod client;
mod error;
mod lfs;
mod options;
mod push;
mod selection;
mod upload;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::disk::require_free;
use super::error::CheckpointError;
use super::folder::{
    ADAPTER_CONFIG_FILE, CONFIG_FILE, Checkpoint, INDEX_FILE, WEIGHTS_FILE, hex, no_folder, read_index,
};
use super::headers::{HeaderBytes, Headers};
use crate::nearest::did_you_mean;
use cache::{ADAPTER_WEIGHTS_FILE, RepoCache, cached_repos, missing_files};
use client::{Client, FileInfo, RevisionInfo};
pub use error::HubError;
pub use options::HubOptions;
pub use push::{PushFile, PushReport, PushRequest, PushSource, check_target, push};
pub use selection::{Selection, select_files};

/// Times a broken transfer is taken up again.
const RETRIES: u32 = 5;

/// How far a transfer is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file's name in the repository.
    pub file: &'a str,
    /// Bytes that have arrived.
    pub done: u64,
    /// Bytes in all, where the hub says it.
    pub total: Option<u64>,
}

/// The folder of the model or adapter that `base` names.
///
/// An existing folder is itself. A path that does not exist is an error: what begins with `.`, `/` or `~` or has
/// more than one `/` is a path. Anything else is a hub id, `org/name` or `name`, whose files are brought into the
/// cache where they are not there yet; the folder is then a snapshot in the cache. Offline, the cache must have them.
///
/// Only configuration, tokenizer, licence and safetensors are downloaded.
pub fn resolve(base: &str, options: &HubOptions) -> Result<PathBuf, CheckpointError> {
    resolve_with_progress(base, options, &mut |_| {})
}

/// As [`resolve`], telling `progress` about every piece of a file that arrives.
pub fn resolve_with_progress(
    base: &str,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, CheckpointError> {
    match place(base, options)? {
        Place::Folder(dir) => Ok(dir),
        Place::Hub { revision, cache } if options.offline => find_cached(base, revision, options, &cache),
        Place::Hub { revision, cache } => {
            let client = Client::new(options, base, revision)?;
            let info = client.revision_info()?;
            let mut download = Download { client: &client, cache: &cache, commit: &info.sha, progress };
            for file in wanted_files(base, &info)? {
                download.fetch(file)?;
                if file == INDEX_FILE {
                    for shard in shards(&cache.snapshot(&info.sha))? {
                        download.fetch(&shard)?;
                    }
                }
            }
            cache.remember(revision, &info.sha)?;
            Ok(cache.snapshot(&info.sha))
        }
    }
}

/// The headers of the model that `base` names, as [`resolve`] understands it.
///
/// Where the weights of a hub id are not in the cache, they are not downloaded either: of each file only the header
/// is asked for. Configuration, tokenizer and index come into the cache as usual. Offline, the cache must have
/// everything.
pub fn resolve_headers(base: &str, options: &HubOptions) -> Result<Headers, CheckpointError> {
    let (revision, cache) = match place(base, options)? {
        Place::Folder(dir) => return Headers::of(&Checkpoint::open(&dir)?),
        Place::Hub { revision, cache } if options.offline => {
            let dir = find_cached(base, revision, options, &cache)?;
            return Headers::of(&Checkpoint::open(&dir)?);
        }
        Place::Hub { revision, cache } => (revision, cache),
    };
    let client = Client::new(options, base, revision)?;
    let info = client.revision_info()?;
    let snapshot = cache.snapshot(&info.sha);
    let mut download = Download { client: &client, cache: &cache, commit: &info.sha, progress: &mut |_| {} };
    let mut weights = Vec::new();
    for file in wanted_files(base, &info)? {
        if file == ADAPTER_WEIGHTS_FILE {
            continue;
        }
        if file.ends_with(".safetensors") {
            weights.push(file.to_string());
            continue;
        }
        download.fetch(file)?;
        if file == INDEX_FILE {
            weights.extend(shards(&snapshot)?);
        }
    }
    let is_model = weights == [WEIGHTS_FILE] || snapshot.join(INDEX_FILE).is_file();
    if !is_model || weights.iter().all(|file| snapshot.join(file).is_file()) {
        return Headers::of(&Checkpoint::open(&snapshot)?);
    }
    let mut parts = Vec::with_capacity(weights.len());
    let mut missing_bytes = 0;
    for file in weights {
        let (bytes, length) = client.safetensors_header(&info.sha, &file)?;
        if !snapshot.join(&file).is_file() {
            missing_bytes += length;
        }
        parts.push(HeaderBytes { file, bytes, length });
    }
    Headers::of_parts(&snapshot, &parts, missing_bytes)
}

/// Where what a user calls a model is to be found.
enum Place<'a> {
    Folder(PathBuf),
    Hub { revision: &'a str, cache: RepoCache },
}

fn place<'a>(base: &str, options: &'a HubOptions) -> Result<Place<'a>, CheckpointError> {
    let path = Path::new(base);
    if path.is_dir() {
        return Ok(Place::Folder(path.to_path_buf()));
    }
    if base.starts_with(['.', '/', '~']) || base.matches('/').count() > 1 || path.exists() {
        return Err(no_folder(path));
    }
    if !is_repo_name(base) {
        return Err(HubError::InvalidName { base: base.to_string() }.into());
    }
    let revision = options.revision.as_deref().unwrap_or("main");
    if !is_revision(revision) {
        return Err(HubError::InvalidRevision { revision: revision.to_string() }.into());
    }
    Ok(Place::Hub { revision, cache: RepoCache::new(&options.cache_dir, base) })
}

/// The files that the index in the folder `snapshot` names, sorted.
fn shards(snapshot: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    Ok(read_index(&snapshot.join(INDEX_FILE))?.into_values().collect())
}

/// The snapshot in the cache, complete.
fn find_cached(
    repo: &str,
    revision: &str,
    options: &HubOptions,
    cache: &RepoCache,
) -> Result<PathBuf, CheckpointError> {
    let snapshot = cache.commit(revision).map(|commit| cache.snapshot(&commit));
    let (missing, hint) = match snapshot.filter(|snapshot| snapshot.is_dir()) {
        Some(snapshot) => {
            let missing = missing_files(&snapshot)?;
            if missing.is_empty() {
                return Ok(snapshot);
            }
            (missing.join(", "), String::new())
        }
        None => {
            let cached = cached_repos(&options.cache_dir);
            let others = cached.iter().map(String::as_str).filter(|name| *name != repo);
            ("the whole snapshot".to_string(), did_you_mean(repo, others))
        }
    };
    Err(HubError::NotCached {
        repo: repo.to_string(),
        revision: revision.to_string(),
        cache: options.cache_dir.clone(),
        missing,
        hint,
    }
    .into())
}

/// The files of the repository that are of use, small ones first; shards follow from the index.
fn wanted_files<'a>(repo: &str, info: &'a RevisionInfo) -> Result<Vec<&'a str>, HubError> {
    const SMALL: [&str; 15] = [
        CONFIG_FILE,
        ADAPTER_CONFIG_FILE,
        "task_vector.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    ];
    let top: Vec<&str> = info.files().filter(|file| is_top_level(file)).collect();
    let mut wanted: Vec<&str> = top
        .iter()
        .copied()
        .filter(|file| {
            SMALL.contains(file) || ["LICENSE", "NOTICE"].iter().any(|name| file.starts_with(name))
        })
        .collect();
    let small = wanted.len();
    // As transformers chooses: one file before shards.
    let one_file = top.contains(&WEIGHTS_FILE);
    let weights = if one_file { WEIGHTS_FILE } else { INDEX_FILE };
    wanted.extend([ADAPTER_WEIGHTS_FILE, weights].into_iter().filter(|file| top.contains(file)));
    if wanted.len() == small {
        wanted.extend(top.iter().copied().filter(|file| file.ends_with(".safetensors")));
    }
    if wanted.len() == small {
        let repo = repo.to_string();
        let is_pickle =
            |file: &&&str| file.ends_with(".bin") || file.ends_with(".pt") || file.ends_with(".pth");
        return Err(match top.iter().find(is_pickle) {
            Some(file) => HubError::PickleOnly { repo, file: file.to_string() },
            None => HubError::NoWeights { repo },
        });
    }
    Ok(wanted)
}

/// Brings the files of one commit into the cache.
struct Download<'a> {
    client: &'a Client<'a>,
    cache: &'a RepoCache,
    commit: &'a str,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Download<'_> {
    /// Sees that `file` is in the snapshot, and asks for nothing where it is.
    fn fetch(&mut self, file: &str) -> Result<(), CheckpointError> {
        if self.cache.snapshot(self.commit).join(file).is_file() {
            return Ok(());
        }
        let info = self.client.file_info(self.commit, file)?;
        let blob = self.cache.blob(&info.etag);
        let _lock = self.cache.lock(&info.etag)?;
        if !blob.is_file() {
            self.receive(file, &info, &blob)?;
        }
        self.cache.link(self.commit, file, &info.etag)
    }

    /// Downloads to `BLOB.incomplete`, going on where an earlier try ended, and renames when it is whole.
    fn receive(&mut self, file: &str, info: &FileInfo, blob: &Path) -> Result<(), CheckpointError> {
        let partial = blob.with_file_name(format!("{}.incomplete", info.etag));
        if let Some(parent) = blob.parent() {
            fs::create_dir_all(parent).map_err(CheckpointError::write(parent))?;
        }
        let present = partial.metadata().map_or(0, |metadata| metadata.len());
        require_free(blob, info.size.unwrap_or(0).saturating_sub(present))?;
        let mut tries = 0;
        while let Err(error) = self.transfer(file, info, &partial) {
            let again = matches!(
                &error,
                CheckpointError::Hub(HubError::Interrupted { .. } | HubError::Unreachable { .. })
            );
            if !again || tries == RETRIES {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(200 << tries));
            tries += 1;
        }
        if let Err(error) = verify(file, info, &partial) {
            // Going on from wrong bytes would never end well.
            fs::remove_file(&partial).map_err(CheckpointError::write(&partial))?;
            return Err(error);
        }
        File::open(&partial)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&partial, blob))
            .map_err(CheckpointError::write(blob))
    }

    /// One connection's worth of the file, appended to `partial`.
    fn transfer(&mut self, file: &str, info: &FileInfo, partial: &Path) -> Result<(), CheckpointError> {
        let failed = || CheckpointError::write(partial);
        let interrupted = |reason: String| HubError::Interrupted { file: file.to_string(), reason };
        let mut out = File::options().create(true).append(true).open(partial).map_err(failed())?;
        let mut done = out.metadata().map_err(failed())?.len();
        if info.size == Some(done) {
            return Ok(());
        }
        if info.size.is_none_or(|size| done > size) {
            // Without a size nobody knows whether the rest belongs to it.
            done = 0;
        }
        let (begin, body) = self.client.download(self.commit, file, done)?;
        out.set_len(begin).map_err(failed())?;
        done = begin;
        // Never more than announced, by one byte that shows it.
        let limit = info.size.map_or(u64::MAX, |size| size - begin + 1);
        let mut body = body.into_reader().take(limit);
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(interrupted(error.to_string()).into()),
            };
            out.write_all(&buffer[..count]).map_err(failed())?;
            done += count as u64;
            (self.progress)(Progress { file, done, total: info.size });
        }
        match info.size {
            Some(size) if done < size => Err(interrupted(format!("{done} of {size} bytes arrived")).into()),
            _ => Ok(()),
        }
    }
}

/// Checks size, and where the hub names the contents by SHA-256, the hash.
fn verify(file: &str, info: &FileInfo, partial: &Path) -> Result<(), CheckpointError> {
    let corrupt =
        |expected: String, found: String| HubError::Corrupt { file: file.to_string(), expected, found };
    let mut contents = File::open(partial).map_err(CheckpointError::read(partial))?;
    let size = contents.metadata().map_err(CheckpointError::read(partial))?.len();
    if let Some(expected) = info.size.filter(|expected| *expected != size) {
        return Err(corrupt(format!("{expected} bytes"), format!("{size} or more")).into());
    }
    if info.etag.len() == 64 {
        let mut hash = Sha256::new();
        io::copy(&mut contents, &mut hash).map_err(CheckpointError::read(partial))?;
        let found = hex(&hash.finalize());
        if !found.eq_ignore_ascii_case(&info.etag) {
            return Err(corrupt(format!("SHA-256 {}", info.etag), found).into());
        }
    }
    Ok(())
}

/// Whether the hub could have a repository of that name.
fn is_repo_name(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    name.len() <= 96
        && name.split('/').all(part)
        && !name.contains("--")
        && !name.contains("..")
        && !name.ends_with(".git")
}

/// Whether a revision can be part of an address and of a path in the cache.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 256
        && revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\')
        })
}

/// Whether a file of the repository lies in no subfolder and has a name fit for the cache.
fn is_top_level(file: &str) -> bool {
    !file.is_empty()
        && !file.starts_with('.')
        && !file.contains(['/', '\\'])
        && !file.contains(char::is_control)
}

#[cfg(test)]
mod header_tests;
#[cfg(test)]
mod push_tests;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;
