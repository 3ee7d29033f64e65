//! Uploading a folder's files as one commit.
//!
//! The hub's protocol: `POST /api/repos/create`; `/api/models/ID/preupload/REV` says from names, sizes and first bytes
//! which files are large; those go to storage (see [`lfs`](super::lfs)); `/api/models/ID/commit/REV` takes one JSON object
//! a line, a header and then each file, small ones with their contents.

use std::io::Read;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::json;

use super::cache::is_commit;
use super::client::{Client, RevisionInfo, invalid, quote, read_json};
use super::error::HubError;
use super::options::HubOptions;
use super::{Progress, is_repo_name, is_revision, lfs};
use crate::checkpoint::CheckpointError;

/// Bytes at a file's beginning by which the hub tells text from binary.
const SAMPLE: u64 = 512;
/// Files asked about in one request.
const PREUPLOAD: usize = 256;
/// Bytes of all files that go into the commit itself; the hub sends larger ones to storage.
const MAX_INLINE_BYTES: u64 = 64 << 20;

/// A file to upload.
#[derive(Debug, Clone)]
pub struct PushFile {
    /// Its path in the repository, with `/` between names.
    pub path: String,
    /// Its contents.
    pub source: PushSource,
    /// Its bytes.
    pub size: u64,
}

/// Where a file's contents are.
#[derive(Debug, Clone)]
pub enum PushSource {
    /// On disk.
    File(PathBuf),
    /// In memory.
    Bytes(Vec<u8>),
}

impl PushFile {
    /// What to name in errors.
    pub(super) fn place(&self) -> PathBuf {
        match &self.source {
            PushSource::File(path) => path.clone(),
            PushSource::Bytes(_) => PathBuf::from(&self.path),
        }
    }
}

/// What to upload, and where to.
#[derive(Debug, Clone)]
pub struct PushRequest<'a> {
    /// The repository, `org/name`.
    pub repo: &'a str,
    /// The files.
    pub files: &'a [PushFile],
    /// The commit's message.
    pub message: &'a str,
    /// Make the repository or branch where there is none.
    pub create: bool,
    /// Only into a private repository; one that is made is private.
    pub private: bool,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct PushReport {
    /// The new commit.
    pub commit: String,
    /// The page of the repository.
    pub url: String,
    /// Whether the repository was made.
    pub created: bool,
    /// Files in the commit itself.
    pub small: usize,
    /// Files in storage.
    pub large: usize,
    /// Those of them that were in storage already.
    pub present: usize,
    /// Paths that the repository's own `.gitignore` keeps out.
    pub ignored: Vec<String>,
}

#[derive(Deserialize)]
struct Preupload {
    files: Vec<UploadMode>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct UploadMode {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Commit {
    commit_oid: String,
}

/// Uploads the files as one commit onto the branch `options.revision`, `main` where there is none. What is in the
/// repository besides stays as it is. Large files are read in pieces.
///
/// # Errors
/// Offline use, a missing or refused token, a repository or branch that is not there (without `create`), one that is
/// public although `private` was asked for, a branch that moved meanwhile, and whatever else the hub refuses; a file that
/// cannot be read; a connection that stays lost after several tries. The branch is as it was then.
pub fn push(
    request: &PushRequest<'_>,
    options: &HubOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PushReport, CheckpointError> {
    let repo = request.repo;
    let revision = options.revision.as_deref().unwrap_or("main");
    check_target(repo, revision)?;
    if options.offline {
        return Err(HubError::Offline { repo: repo.to_string() }.into());
    }
    if options.token.is_none() {
        return Err(HubError::PushNeedsToken { repo: repo.to_string() }.into());
    }
    let client = Client::new(options, repo, revision)?;
    let (info, created) = open_branch(&client, request)?;
    if request.private && info.private == Some(false) {
        return Err(HubError::PublicRepo { repo: repo.to_string() }.into());
    }

    let (mut small, mut large, mut ignored) = (Vec::new(), Vec::new(), Vec::new());
    for (file, mode) in request.files.iter().zip(upload_modes(&client, request.files)?) {
        match mode {
            Mode::Ignore => ignored.push(file.path.clone()),
            // Storage takes no empty objects.
            Mode::Large if file.size > 0 => large.push(file),
            Mode::Large | Mode::Small => small.push(file),
        }
    }
    let inline: u64 = small.iter().map(|file| file.size).sum();
    if inline > MAX_INLINE_BYTES {
        let url = client.api("preupload");
        return Err(invalid(&url, &format!("{inline} bytes as small files")).into());
    }
    let digests = lfs::digests(&large)?;
    let present = lfs::upload(&client, &large, &digests, progress)?;

    let mut lines = header_line(request.message, &info.sha);
    for file in &small {
        let mut bytes = Vec::new();
        let read = file.open(0, file.size).and_then(|mut body| body.read_to_end(&mut bytes));
        read.map_err(CheckpointError::read(&file.place()))?;
        let value = json!({"content": base64(&bytes), "path": file.path, "encoding": "base64"});
        lines.push_str(&format!("{}\n", json!({"key": "file", "value": value})));
    }
    for (file, oid) in large.iter().zip(&digests) {
        let value = json!({"path": file.path, "algo": "sha256", "oid": oid, "size": file.size});
        lines.push_str(&format!("{}\n", json!({"key": "lfsFile", "value": value})));
    }
    let url = client.api("commit");
    let mut response = client.post(&url, lines.as_bytes(), "application/x-ndjson", true, "the commit")?;
    client.require_success(&url, &mut response)?;
    let commit: Commit = read_json(&url, &mut response)?;
    Ok(PushReport {
        commit: commit.commit_oid,
        url: format!("{}/{repo}", client.endpoint),
        created,
        small: small.len(),
        large: large.len(),
        present,
        ignored,
    })
}

/// Checks the names of a repository and branch to push to, without any connection.
pub fn check_target(repo: &str, revision: &str) -> Result<(), HubError> {
    if !is_repo_name(repo) || repo.matches('/').count() != 1 {
        return Err(HubError::InvalidTarget { repo: repo.to_string() });
    }
    match is_revision(revision) {
        true => Ok(()),
        false => Err(HubError::InvalidRevision { revision: revision.to_string() }),
    }
}

/// The branch as it stands, made first where that is wanted; and whether the repository was made.
fn open_branch(client: &Client<'_>, request: &PushRequest<'_>) -> Result<(RevisionInfo, bool), HubError> {
    let mut created = false;
    let mut found = client.branch(client.revision);
    if matches!(found, Err(HubError::RepoMissing { .. })) && request.create {
        let (organization, name) = request.repo.split_once('/').unwrap_or(("", request.repo));
        let body = json!({
            "type": "model",
            "name": name,
            "organization": organization,
            "private": request.private,
        });
        let url = format!("{}/api/repos/create", client.endpoint);
        let text = body.to_string();
        let mut response =
            client.post(&url, text.as_bytes(), "application/json", true, "the new repository")?;
        // 409: somebody was faster.
        if response.status() != 409 {
            client.require_success(&url, &mut response)?;
            created = true;
        }
        found = client.branch(client.revision);
    }
    match found {
        Err(HubError::BranchMissing { .. }) if request.create => {
            let url = client.api("branch");
            let mut response = client.post(&url, b"{}", "application/json", true, "the new branch")?;
            if response.status() != 409 {
                client.require_success(&url, &mut response)?;
            }
            Ok((client.branch(client.revision)?, created))
        }
        result => Ok((result?, created)),
    }
}

enum Mode {
    Small,
    Large,
    Ignore,
}

/// What the hub wants done with each file.
fn upload_modes(client: &Client<'_>, files: &[PushFile]) -> Result<Vec<Mode>, CheckpointError> {
    let url = client.api("preupload");
    let mut modes = Vec::new();
    for files in files.chunks(PREUPLOAD) {
        let mut list = Vec::new();
        for file in files {
            let mut sample = Vec::new();
            let read = file.open(0, SAMPLE.min(file.size)).and_then(|mut body| body.read_to_end(&mut sample));
            read.map_err(CheckpointError::read(&file.place()))?;
            list.push(json!({"path": file.path, "sample": base64(&sample), "size": file.size}));
        }
        let request = json!({ "files": list });
        let answer: Preupload = client.post_json(&url, &request, "application/json", "the list of files")?;
        for file in files {
            let entry = answer.files.iter().find(|entry| entry.path == file.path);
            modes.push(match entry {
                Some(entry) if entry.should_ignore => Mode::Ignore,
                Some(entry) if entry.upload_mode == "lfs" => Mode::Large,
                Some(entry) if entry.upload_mode == "regular" => Mode::Small,
                _ => return Err(invalid(&url, &format!("no upload mode for {}", file.path)).into()),
            });
        }
    }
    Ok(modes)
}

fn header_line(message: &str, parent: &str) -> String {
    // The parent keeps a commit from landing on a branch that moved, and from landing twice.
    let value = json!({"summary": message, "description": "", "parentCommit": parent});
    format!("{}\n", json!({"key": "header", "value": value}))
}

impl Client<'_> {
    /// Where a branch stands.
    fn branch(&self, revision: &str) -> Result<RevisionInfo, HubError> {
        let url = format!("{}/api/models/{}/revision/{}", self.endpoint, self.repo, quote(revision, false));
        let mut response = self.get(&url, "the branch")?;
        self.require_success(&url, &mut response)?;
        let info: RevisionInfo = read_json(&url, &mut response)?;
        match is_commit(&info.sha) {
            true => Ok(info),
            false => Err(invalid(&url, "`sha` is no commit")),
        }
    }

    /// An address of the API about this repository and revision.
    fn api(&self, what: &str) -> String {
        format!("{}/api/models/{}/{what}/{}", self.endpoint, self.repo, quote(self.revision, false))
    }
}

/// Base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            text.push(if digit <= group.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648, section 10.
    #[test]
    fn base64_of_the_standard() {
        let vectors = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(vectors, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }
}
