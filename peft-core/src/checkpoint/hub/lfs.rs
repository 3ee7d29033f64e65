//! Large files: the batch request of Git LFS, then the bytes to wherever the hub says, in one piece or in parts.
//!
//! See <https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>. The hub's transfer `multipart` is its own: the
//! upload action's headers hold `chunk_size` and under numbers the address of each part, and its `href` takes the list of
//! the parts' ETags at the end.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::client::{Client, header, invalid};
use super::error::HubError;
use super::push::{PushFile, PushSource};
use super::upload::{Method, Outgoing};
use super::{Progress, hex};
use crate::checkpoint::CheckpointError;

const MEDIA_TYPE: &str = "application/vnd.git-lfs+json";
/// Objects asked for in one request.
const BATCH: usize = 100;
/// Parts of one file, as storage services have it.
const MAX_PARTS: u64 = 10_000;

#[derive(Deserialize)]
struct BatchAnswer {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    code: u16,
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Option<BTreeMap<String, Value>>,
}

/// Computes the SHA-256 of each file, in hex.
pub(super) fn digests(files: &[&PushFile]) -> Result<Vec<String>, CheckpointError> {
    let digest = |file: &&PushFile| {
        let mut hash = Sha256::new();
        let mut read = || io::copy(&mut file.open(0, file.size)?, &mut hash);
        read().map_err(CheckpointError::read(&file.place()))?;
        Ok(hex(&hash.finalize()))
    };
    files.iter().map(digest).collect()
}

/// Brings `files` with the SHA-256 `digests` into the hub's storage; returns how many were there already.
pub(super) fn upload(
    client: &Client<'_>,
    files: &[&PushFile],
    digests: &[String],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<usize, HubError> {
    let url = format!("{}/{}.git/info/lfs/objects/batch", client.endpoint, client.repo);
    let mut present = 0;
    for (files, digests) in files.chunks(BATCH).zip(digests.chunks(BATCH)) {
        let objects: Vec<Value> =
            files.iter().zip(digests).map(|(file, oid)| json!({"oid": oid, "size": file.size})).collect();
        let request = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": objects,
            "hash_algo": "sha256",
            "ref": {"name": client.revision},
        });
        let answer: BatchAnswer = client.post_json(&url, &request, MEDIA_TYPE, "the list of large files")?;
        for (file, oid) in files.iter().zip(digests) {
            let object = answer.objects.iter().find(|object| object.oid == *oid);
            let object = object.ok_or_else(|| invalid(&url, "an object is missing"))?;
            if let Some(error) = &object.error {
                let reason = error.message.chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(HubError::ObjectRefused { file: file.path.clone(), status: error.code, reason });
            }
            let Some(Actions { upload: Some(upload), verify }) = &object.actions else {
                present += 1;
                continue;
            };
            send(client, file, oid, upload, progress)?;
            if let Some(verify) = verify {
                let body = json!({"oid": oid, "size": file.size}).to_string();
                let what = file.path.as_str();
                let mut response = client.post(&verify.href, body.as_bytes(), MEDIA_TYPE, true, what)?;
                client.require_success(&verify.href, &mut response)?;
            }
        }
    }
    Ok(present)
}

/// Sends one file's bytes.
fn send(
    client: &Client<'_>,
    file: &PushFile,
    oid: &str,
    action: &Action,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), HubError> {
    let no_headers = BTreeMap::new();
    let headers = action.header.as_ref().unwrap_or(&no_headers);
    let Some(chunk) = headers.get("chunk_size") else {
        let headers: Vec<(String, String)> = headers
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_string())))
            .collect();
        put(client, file, &action.href, &headers, (0, file.size), progress)?;
        return Ok(());
    };
    let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok()).filter(|chunk| *chunk > 0);
    let chunk = chunk.ok_or_else(|| invalid(&action.href, "a `chunk_size` that is no number"))?;
    let count = file.size.div_ceil(chunk);
    // Names like "00001" and "1" are the same part.
    let urls: BTreeMap<u64, &str> =
        headers.iter().filter_map(|(number, url)| Some((number.parse().ok()?, url.as_str()?))).collect();
    if count > MAX_PARTS || urls.len() as u64 != count || !urls.keys().copied().eq(1..=count) {
        return Err(invalid(&action.href, &format!("{} addresses for {count} parts", urls.len())));
    }
    let mut parts = Vec::new();
    for (number, url) in urls {
        let begin = (number - 1) * chunk;
        let span = (begin, chunk.min(file.size - begin));
        let etag = put(client, file, url, &[], span, progress)?;
        let etag = etag.ok_or_else(|| invalid(url, "a part without ETag"))?;
        parts.push(json!({"partNumber": number, "etag": etag}));
    }
    let body = json!({"oid": oid, "parts": parts}).to_string();
    let mut response = client.post(&action.href, body.as_bytes(), MEDIA_TYPE, false, &file.path)?;
    client.require_success(&action.href, &mut response)
}

/// Puts `length` bytes of `file` from `begin` on to `url`, an address that is signed; returns the ETag.
fn put(
    client: &Client<'_>,
    file: &PushFile,
    url: &str,
    headers: &[(String, String)],
    (begin, length): (u64, u64),
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Option<String>, HubError> {
    progress(Progress { file: &file.path, done: begin, total: Some(file.size) });
    let progress = RefCell::new(progress);
    let mut response = client.persist(Outgoing {
        method: Method::Put,
        url,
        signed_in: false,
        headers,
        length,
        body: &mut || {
            let inner = file.open(begin, length)?;
            Ok(Box::new(Counted { inner, file, done: begin, progress: &progress }))
        },
        what: &file.path,
    })?;
    client.require_success(url, &mut response)?;
    Ok(header(&response, "etag"))
}

/// A file on its way out, telling how far it is.
struct Counted<'a, 'p> {
    inner: Box<dyn Read + 'a>,
    file: &'a PushFile,
    done: u64,
    progress: &'a RefCell<&'p mut dyn FnMut(Progress<'_>)>,
}

impl Read for Counted<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.done += count as u64;
        let progress = Progress { file: &self.file.path, done: self.done, total: Some(self.file.size) };
        (self.progress.borrow_mut())(progress);
        Ok(count)
    }
}

impl PushFile {
    /// Reads `length` bytes from `begin` on.
    pub(super) fn open(&self, begin: u64, length: u64) -> io::Result<Box<dyn Read + '_>> {
        match &self.source {
            PushSource::File(path) => {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(begin))?;
                Ok(Box::new(io::BufReader::with_capacity(1 << 18, file).take(length)))
            }
            PushSource::Bytes(bytes) => {
                let begin = (begin as usize).min(bytes.len());
                Ok(Box::new(bytes[begin..].take(length)))
            }
        }
    }
}
