//! A hub, its CDN and its storage on loopback ports, small but in the real protocol.

#![allow(clippy::unwrap_used, dead_code, missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The commit at which the test repository stands.
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the servers do and what they saw.
#[derive(Default)]
pub(super) struct State {
    /// Contents of the repository `org/name`.
    pub(super) files: HashMap<String, Vec<u8>>,
    /// Required to get in.
    pub(super) token: Option<String>,
    /// The next downloads from the CDN that break off half way.
    pub(super) breaks: usize,
    /// Contents that the CDN sends instead of the real ones.
    pub(super) forged: Option<Vec<u8>>,
    /// Method, path and range of each request; the CDN's paths begin with `cdn`.
    pub(super) seen: Vec<String>,
    /// `Authorization` headers that reached the CDN or the storage.
    pub(super) leaked: Vec<String>,
    /// Whether `org/name` does not exist.
    pub(super) missing: bool,
    /// Whether it is private.
    pub(super) private: bool,
    /// Whether somebody else pushes at the same time.
    pub(super) moved: bool,
    /// Objects in the storage, by SHA-256.
    pub(super) objects: HashMap<String, Vec<u8>>,
    /// Objects are sent in parts of so many bytes; 0 for one piece.
    pub(super) chunk_size: usize,
    /// Parts of objects, by path.
    pub(super) parts: BTreeMap<String, Vec<u8>>,
    /// The next uploads that break off half way.
    pub(super) cuts: usize,
    /// Answers in place of the real ones, each once: a part of the path, the status, and a `Retry-After`.
    pub(super) faults: Vec<(&'static str, &'static str, Option<&'static str>)>,
    /// The headers of commits.
    pub(super) commits: Vec<Value>,
    /// The bodies of requests for a new repository.
    pub(super) creations: Vec<Value>,
    /// Branches besides `main`.
    pub(super) branches: Vec<String>,
    /// The CDN sends whole files whatever part is asked for.
    pub(super) whole: bool,
    /// Bytes of contents that the CDN has sent.
    pub(super) sent: usize,
}

/// Both servers; they end with the test process.
pub(super) struct TestHub {
    pub(super) endpoint: String,
    pub(super) state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl TestHub {
    pub(super) fn start(files: &[(&str, &[u8])]) -> Self {
        let state = Arc::new(Mutex::new(State {
            files: files.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())).collect(),
            ..State::default()
        }));
        let cdn = serve(state.clone(), answer_cdn);
        let hub = serve(state.clone(), move |state, request, stream| {
            answer_hub(state, request, stream, &cdn);
        });
        Self { endpoint: hub, state }
    }

    /// The requests since the last call.
    pub(super) fn take_seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

/// Answers one request a connection; returns the address.
fn serve(
    state: Arc<Mutex<State>>,
    answer: impl Fn(&mut State, Request, &mut TcpStream) + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read_request(&stream, &state);
            if let Some(request) = request {
                answer(&mut state.lock().unwrap(), request, &mut stream);
            }
        }
    });
    address
}

fn read_request(stream: &TcpStream, state: &Mutex<State>) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let mut words = lines.first()?.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let headers: HashMap<String, String> = lines[1..]
        .iter()
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_lowercase(), value.to_string()))
        })
        .collect();
    // Bodies always announce their length.
    assert!(!headers.contains_key("transfer-encoding"), "{headers:?}");
    let length: usize = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    {
        let mut state = state.lock().unwrap();
        if method == "PUT" && state.cuts > 0 {
            state.cuts -= 1;
            state.seen.push(format!("cut {path}"));
            body.truncate(length / 2);
            let _ = reader.read_exact(&mut body);
            return None;
        }
    }
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, headers, body })
}

/// Sends a response whose body may be cut short of its announced length.
fn respond(stream: &mut TcpStream, status: &str, headers: &[(&str, String)], length: usize, body: &[u8]) {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    // A client that has heard enough may be gone.
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.write_all(body));
}

fn respond_json(stream: &mut TcpStream, status: &str, value: &Value) {
    let text = value.to_string();
    respond(stream, status, &[], text.len(), text.as_bytes());
}

fn refuse(stream: &mut TcpStream, status: &str, code: &str) {
    respond(stream, status, &[("X-Error-Code", code.to_string())], 0, b"");
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends the next fault that is meant for this request.
fn fault(state: &mut State, request: &Request, stream: &mut TcpStream) -> bool {
    let Some(index) = state.faults.iter().position(|(part, ..)| request.path.contains(part)) else {
        return false;
    };
    let (_, status, retry_after) = state.faults.remove(index);
    let headers: Vec<(&str, String)> =
        retry_after.iter().map(|seconds| ("Retry-After", seconds.to_string())).collect();
    let body = json!({"error": "as the hub says; token hf_secret"}).to_string();
    respond(stream, status, &headers, body.len(), body.as_bytes());
    true
}

fn answer_hub(state: &mut State, request: Request, stream: &mut TcpStream, cdn: &str) {
    state.seen.push(format!("{} {}", request.method, request.path));
    if fault(state, &request, stream) {
        return;
    }
    let authorization = request.headers.get("authorization").cloned();
    if request.path.starts_with("/api/complete_multipart?") {
        state.leaked.extend(authorization);
        return complete(state, &request, stream);
    }
    if state.token.as_ref().is_some_and(|token| authorization != Some(format!("Bearer {token}"))) {
        return refuse(stream, "401 Unauthorized", "GatedRepo");
    }
    if request.path == "/api/repos/create" {
        state.creations.push(request.json());
        if !state.missing {
            return refuse(stream, "409 Conflict", "");
        }
        state.missing = false;
        state.private = request.json()["private"] == true;
        return respond_json(stream, "200 OK", &json!({"url": "org/name"}));
    }
    if let Some(rest) = request.path.strip_prefix("/org/name.git/info/lfs/") {
        return match rest {
            "objects/batch" => batch(state, &request, stream, cdn),
            _ => verify(state, &request, stream),
        };
    }
    if let Some(rest) = request.path.strip_prefix("/api/models/") {
        return answer_api(state, &request, rest, stream);
    }
    let file = request.path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, file)| file.to_string());
    let Some((file, contents)) = file.and_then(|file| Some((file.clone(), state.files.get(&file)?))) else {
        return refuse(stream, "404 Not Found", "EntryNotFound");
    };
    let commit = ("X-Repo-Commit", COMMIT.to_string());
    let digest = sha256(contents);
    if file.ends_with(".safetensors") {
        // Large files are sent from elsewhere.
        let headers = [
            commit,
            ("X-Linked-Etag", format!("\"{digest}\"")),
            ("X-Linked-Size", contents.len().to_string()),
            ("ETag", "\"of-the-redirect\"".to_string()),
            ("Location", format!("{cdn}/{file}?Signature=secret")),
        ];
        return respond(stream, "302 Found", &headers, 0, b"");
    }
    let body = if request.method == "HEAD" { &[][..] } else { contents };
    let headers = [commit, ("ETag", format!("W/\"{}\"", &digest[..40]))];
    respond(stream, "200 OK", &headers, contents.len(), body);
}

/// What is below `/api/models/`.
fn answer_api(state: &mut State, request: &Request, rest: &str, stream: &mut TcpStream) {
    let split = ["revision", "preupload", "commit", "branch"]
        .iter()
        .find_map(|what| Some((*what, rest.split_once(&format!("/{what}/"))?)));
    let Some((what, (repo, revision))) = split else {
        return refuse(stream, "404 Not Found", "");
    };
    if repo == "org/old" {
        let location = format!("/api/models/org/name/{what}/{revision}");
        return respond(stream, "307 Moved", &[("Location", location)], 0, b"");
    }
    if repo != "org/name" || state.missing {
        return refuse(stream, "404 Not Found", "RepoNotFound");
    }
    if what == "branch" {
        state.branches.push(revision.to_string());
        return respond_json(stream, "201 Created", &json!({}));
    }
    let known = ["main", "refs%2Fpr%2F1", COMMIT].contains(&revision);
    if !known && !state.branches.iter().any(|branch| branch == revision) {
        return refuse(stream, "404 Not Found", "RevisionNotFound");
    }
    match what {
        "preupload" => {
            let mode = |file: &Value| {
                let path = file["path"].as_str().unwrap();
                let lfs = path.ends_with(".safetensors");
                let ignore = path == "ignored.txt";
                json!({"path": path, "uploadMode": if lfs { "lfs" } else { "regular" }, "shouldIgnore": ignore})
            };
            let files: Vec<Value> = request.json()["files"].as_array().unwrap().iter().map(mode).collect();
            respond_json(stream, "200 OK", &json!({ "files": files }));
        }
        "commit" => commit(state, request, stream),
        _ => {
            let mut names: Vec<_> = state.files.keys().collect();
            names.sort();
            let siblings: Vec<_> = names.iter().map(|name| json!({"rfilename": name})).collect();
            let body = json!({"sha": COMMIT, "siblings": siblings, "private": state.private});
            respond_json(stream, "200 OK", &body);
        }
    }
}

fn batch(state: &mut State, request: &Request, stream: &mut TcpStream, cdn: &str) {
    let hub = format!("http://{}", request.headers["host"]);
    let request = request.json();
    assert_eq!(request["transfers"], json!(["basic", "multipart"]));
    let action = |object: &Value| {
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
        if state.objects.contains_key(oid) {
            return json!({"oid": oid, "size": size});
        }
        let verify = json!({"href": format!("{hub}/org/name.git/info/lfs/verify")});
        let upload = if state.chunk_size == 0 {
            json!({"href": format!("{cdn}/store/{oid}?X-Signature=secret")})
        } else {
            let mut header = json!({"chunk_size": state.chunk_size.to_string()});
            for part in 1..=size.div_ceil(state.chunk_size) {
                header[format!("{part:05}")] =
                    json!(format!("{cdn}/part/{oid}/{part:05}?X-Signature=secret"));
            }
            json!({"href": format!("{hub}/api/complete_multipart?signature=secret"), "header": header})
        };
        json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    };
    let objects: Vec<Value> = request["objects"].as_array().unwrap().iter().map(action).collect();
    respond_json(stream, "200 OK", &json!({ "objects": objects }));
}

fn complete(state: &mut State, request: &Request, stream: &mut TcpStream) {
    let list = request.json();
    let oid = list["oid"].as_str().unwrap();
    let mut whole = Vec::new();
    for part in list["parts"].as_array().unwrap() {
        let bytes = &state.parts[&format!("/part/{oid}/{:05}", part["partNumber"].as_u64().unwrap())];
        assert_eq!(part["etag"].as_str().unwrap(), format!("\"{}\"", sha256(bytes)));
        whole.extend(bytes);
    }
    state.objects.insert(oid.to_string(), whole);
    respond_json(stream, "200 OK", &json!({}));
}

fn verify(state: &mut State, request: &Request, stream: &mut TcpStream) {
    let object = request.json();
    let bytes = state.objects.get(object["oid"].as_str().unwrap());
    let right = bytes.is_some_and(|bytes| {
        sha256(bytes) == object["oid"].as_str().unwrap()
            && Some(bytes.len() as u64) == object["size"].as_u64()
    });
    respond_json(stream, if right { "200 OK" } else { "400 Bad Request" }, &json!({}));
}

fn commit(state: &mut State, request: &Request, stream: &mut TcpStream) {
    let text = std::str::from_utf8(&request.body).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    if state.moved || lines[0]["value"]["parentCommit"] != COMMIT {
        return refuse(stream, "412 Precondition Failed", "");
    }
    for line in &lines[1..] {
        let value = &line["value"];
        let contents = match line["key"].as_str().unwrap() {
            "file" => decode(value["content"].as_str().unwrap()),
            _ => state.objects[value["oid"].as_str().unwrap()].clone(),
        };
        state.files.insert(value["path"].as_str().unwrap().to_string(), contents);
    }
    state.commits.push(lines[0]["value"].clone());
    respond_json(stream, "200 OK", &json!({"commitOid": "fedcba9876543210fedcba9876543210fedcba98"}));
}

/// Base64 with padding.
fn decode(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => u32::from(byte - b'A'),
        b'a'..=b'z' => u32::from(byte - b'a') + 26,
        b'0'..=b'9' => u32::from(byte - b'0') + 52,
        b'+' => 62,
        b'/' => 63,
        _ => 0,
    };
    let mut bytes = Vec::new();
    for group in text.as_bytes().chunks(4) {
        let bits = group.iter().fold(0, |bits, byte| bits << 6 | digit(*byte));
        let padding = group.iter().filter(|byte| **byte == b'=').count();
        bytes.extend(&bits.to_be_bytes()[1..4 - padding]);
    }
    bytes
}

fn answer_cdn(state: &mut State, request: Request, stream: &mut TcpStream) {
    let range = request.headers.get("range").cloned().unwrap_or_default();
    state.seen.push(format!("{} cdn{} {range}", request.method, request.path));
    state.leaked.extend(request.headers.get("authorization").cloned());
    if fault(state, &request, stream) {
        return;
    }
    let path = request.path.split('?').next().unwrap();
    if request.method == "PUT" {
        let etag = ("ETag", format!("\"{}\"", sha256(&request.body)));
        match path.strip_prefix("/store/") {
            Some(oid) => state.objects.insert(oid.to_string(), request.body),
            None => state.parts.insert(path.to_string(), request.body),
        };
        return respond(stream, "200 OK", &[etag], 0, b"");
    }
    let contents = state.forged.as_ref().unwrap_or(&state.files[&path[1..]]);
    let asked = range.strip_prefix("bytes=").filter(|_| !state.whole).and_then(|range| range.split_once('-'));
    let (from, last) = asked.unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let end = last.parse().map_or(contents.len(), |last: usize| contents.len().min(last + 1));
    let rest = &contents[from.min(end)..end];
    let sent = if state.breaks > 0 { rest.len() / 2 } else { rest.len() };
    state.breaks = state.breaks.saturating_sub(1);
    state.sent += sent;
    if asked.is_none() {
        respond(stream, "200 OK", &[], rest.len(), &rest[..sent]);
    } else {
        let content_range = format!("bytes {from}-{}/{}", end - 1, contents.len());
        let headers = [("Content-Range", content_range)];
        respond(stream, "206 Partial Content", &headers, rest.len(), &rest[..sent]);
    }
}
