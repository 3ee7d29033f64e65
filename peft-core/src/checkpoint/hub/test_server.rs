//! A hub and its CDN on loopback ports, small but in the real protocol.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

use crate::checkpoint::folder::hex;

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
    /// `Authorization` headers that reached the CDN.
    pub(super) leaked: Vec<String>,
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
            if let Some(request) = read_request(&stream) {
                answer(&mut state.lock().unwrap(), request, &mut stream);
            }
        }
    });
    address
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let headers = lines
        .map_while(|line| line.ok().filter(|line| !line.is_empty()))
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_lowercase(), value.to_string()))
        })
        .collect();
    Some(Request { method, path, headers })
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

fn refuse(stream: &mut TcpStream, status: &str, code: &str) {
    respond(stream, status, &[("X-Error-Code", code.to_string())], 0, b"");
}

fn answer_hub(state: &mut State, request: Request, stream: &mut TcpStream, cdn: &str) {
    state.seen.push(format!("{} {}", request.method, request.path));
    let authorization = request.headers.get("authorization").cloned();
    if state.token.as_ref().is_some_and(|token| authorization != Some(format!("Bearer {token}"))) {
        return refuse(stream, "401 Unauthorized", "GatedRepo");
    }
    if let Some(rest) = request.path.strip_prefix("/api/models/") {
        let Some((repo, revision)) = rest.split_once("/revision/") else {
            return refuse(stream, "404 Not Found", "");
        };
        if repo == "org/old" {
            let location = format!("/api/models/org/name/revision/{revision}");
            return respond(stream, "307 Moved", &[("Location", location)], 0, b"");
        }
        if repo != "org/name" {
            return refuse(stream, "404 Not Found", "RepoNotFound");
        }
        if !["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return refuse(stream, "404 Not Found", "RevisionNotFound");
        }
        let mut names: Vec<_> = state.files.keys().collect();
        names.sort();
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return respond(stream, "200 OK", &[], body.len(), body.as_bytes());
    }
    let file = request.path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, file)| file.to_string());
    let Some((file, contents)) = file.and_then(|file| Some((file.clone(), state.files.get(&file)?))) else {
        return refuse(stream, "404 Not Found", "EntryNotFound");
    };
    let commit = ("X-Repo-Commit", COMMIT.to_string());
    let digest = hex(&Sha256::digest(contents));
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

fn answer_cdn(state: &mut State, request: Request, stream: &mut TcpStream) {
    let range = request.headers.get("range").cloned().unwrap_or_default();
    state.seen.push(format!("{} cdn{} {range}", request.method, request.path));
    state.leaked.extend(request.headers.get("authorization").cloned());
    let name = request.path[1..].split('?').next().unwrap();
    let contents = state.forged.as_ref().unwrap_or(&state.files[name]);
    let from: usize =
        range.strip_prefix("bytes=").map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    let rest = &contents[from.min(contents.len())..];
    let sent = if state.breaks > 0 { rest.len() / 2 } else { rest.len() };
    state.breaks = state.breaks.saturating_sub(1);
    if from == 0 {
        respond(stream, "200 OK", &[], rest.len(), &rest[..sent]);
    } else {
        let content_range = format!("bytes {from}-{}/{}", contents.len() - 1, contents.len());
        let headers = [("Content-Range", content_range)];
        respond(stream, "206 Partial Content", &headers, rest.len(), &rest[..sent]);
    }
}
