//! Requests to the hub: few, and with the token for the hub's own host alone.

use std::io::{self, Read};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

use super::cache::{cached_repos, is_commit};
use super::error::HubError;
use super::options::HubOptions;
use crate::checkpoint::file::{LENGTH_BYTES, MAX_HEADER};
use crate::nearest::did_you_mean;

const USER_AGENT: &str = concat!("peft-rs/", env!("CARGO_PKG_VERSION"));
pub(super) const MAX_REDIRECTS: usize = 10;
const MAX_INFO_BYTES: u64 = 64 << 20;

/// Speaks to one endpoint about one repository.
pub(super) struct Client<'a> {
    pub(super) agent: Agent,
    pub(super) endpoint: &'a str,
    pub(super) origin: Origin,
    pub(super) options: &'a HubOptions,
    pub(super) repo: &'a str,
    pub(super) revision: &'a str,
}

/// What the hub says about a revision.
#[derive(Deserialize)]
pub(super) struct RevisionInfo {
    /// The commit at which it stands.
    pub(super) sha: String,
    siblings: Vec<Sibling>,
    /// Whether not everybody may see the repository, where the hub says it.
    #[serde(default)]
    pub(super) private: Option<bool>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl RevisionInfo {
    /// Paths of the repository's files.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        self.siblings.iter().map(|sibling| sibling.rfilename.as_str())
    }
}

/// What the hub says about a file before it sends it.
pub(super) struct FileInfo {
    /// Names the contents: the SHA-256 of large files, another hash of small ones.
    pub(super) etag: String,
    /// Bytes, where the hub says it.
    pub(super) size: Option<u64>,
}

/// Scheme, host and port: what must agree for the token to be sent.
#[derive(PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) secure: bool,
    pub(super) host: String,
    port: u16,
}

impl Origin {
    pub(super) fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        if uri.authority()?.as_str().contains('@') {
            return None;
        }
        let host = uri.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Some(Self { secure, host, port })
    }

    fn is_loopback(&self) -> bool {
        ["localhost", "127.0.0.1", "[::1]"].contains(&self.host.as_str())
    }
}

impl<'a> Client<'a> {
    /// Opens no connection yet. Errors where endpoint or token cannot be used.
    pub(super) fn new(options: &'a HubOptions, repo: &'a str, revision: &'a str) -> Result<Self, HubError> {
        let endpoint = options.endpoint.trim_end_matches('/');
        let origin = Origin::of(endpoint)
            .ok_or_else(|| HubError::InvalidEndpoint { endpoint: printable(endpoint) })?;
        let sendable = |token: &String| token.bytes().all(|byte| byte.is_ascii_graphic());
        if !options.token.iter().all(sendable) {
            return Err(HubError::InvalidToken);
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where it is known who may see the token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(USER_AGENT)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)));
        if origin.is_loopback() {
            // A proxy's loopback is another machine's.
            config = config.proxy(None);
        }
        Ok(Self { agent: config.build().new_agent(), endpoint, origin, options, repo, revision })
    }

    /// Commit and files of the revision.
    pub(super) fn revision_info(&self) -> Result<RevisionInfo, HubError> {
        let url =
            format!("{}/api/models/{}/revision/{}", self.endpoint, self.repo, quote(self.revision, false));
        let mut response = self.send(Method::Get { from: 0, last: None }, &url)?;
        self.check_status(&url, &response, None)?;
        let info: RevisionInfo = read_json(&url, &mut response)?;
        if !is_commit(&info.sha) {
            return Err(invalid(&url, "`sha` is no commit"));
        }
        Ok(info)
    }

    /// Hash and size of `file` at `commit`.
    pub(super) fn file_info(&self, commit: &str, file: &str) -> Result<FileInfo, HubError> {
        let url = self.file_url(commit, file);
        let response = self.send(Method::Head, &url)?;
        // A large file answers with a redirect to another host, and says on it what the file is.
        if !response.status().is_redirection() {
            self.check_status(&url, &response, Some(file))?;
        }
        let etag = header(&response, "x-linked-etag")
            .or_else(|| header(&response, "etag"))
            .ok_or_else(|| invalid(&url, "no ETag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        // It becomes a file's name.
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if etag.is_empty() || etag.len() > 128 || !etag.bytes().all(usable) {
            return Err(invalid(&url, "an ETag that is no hash"));
        }
        let size = match header(&response, "x-linked-size") {
            Some(size) => Some(size),
            None if response.status().is_redirection() => None,
            None => header(&response, "content-length"),
        };
        let size = size
            .map(|size| size.parse().map_err(|_| invalid(&url, "a size that is no number")))
            .transpose()?;
        Ok(FileInfo { etag, size })
    }

    /// The contents of `file` at `commit` from byte `from` on, and the byte at which they really begin: the hub
    /// may send everything instead.
    pub(super) fn download(&self, commit: &str, file: &str, from: u64) -> Result<(u64, Body), HubError> {
        let url = self.file_url(commit, file);
        let response = self.send(Method::Get { from, last: None }, &url)?;
        if response.status() == 416 {
            // Nothing begins there: what was received before is not this file.
            return self.download(commit, file, 0);
        }
        self.check_status(&url, &response, Some(file))?;
        let begin = match response.status().as_u16() {
            206 => begin_of_range(&url, &response, from)?,
            _ => 0,
        };
        Ok((begin, response.into_body()))
    }

    /// The beginning of the safetensors file `file` at `commit`, to the end of its header, and its size in bytes.
    ///
    /// Two requests for parts of the file. From a server that sends whole files all the same, the beginning is read
    /// and the connection closed.
    pub(super) fn safetensors_header(&self, commit: &str, file: &str) -> Result<(Vec<u8>, u64), HubError> {
        let url = self.file_url(commit, file);
        let last = LENGTH_BYTES as u64 - 1;
        let mut response = self.send(Method::Get { from: 0, last: Some(last) }, &url)?;
        self.check_status(&url, &response, Some(file))?;
        let partial = response.status() == 206;
        let size = if partial {
            begin_of_range(&url, &response, 0)?;
            header(&response, "content-range").and_then(|range| range.rsplit('/').next()?.parse().ok())
        } else {
            header(&response, "content-length").and_then(|length| length.parse().ok())
        };
        let size: u64 = size.ok_or_else(|| invalid(&url, "no size of the file"))?;
        let mut begin = vec![0; LENGTH_BYTES];
        let interrupted =
            |error: io::Error| HubError::Interrupted { file: file.to_string(), reason: error.to_string() };
        response.body_mut().as_reader().read_exact(&mut begin).map_err(interrupted)?;
        let claimed = begin.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        if claimed > MAX_HEADER || claimed > size.saturating_sub(LENGTH_BYTES as u64) || claimed == 0 {
            // The check of the header says what is wrong.
            return Ok((begin, size));
        }
        let mut rest = if partial {
            let from = LENGTH_BYTES as u64;
            let rest = self.send(Method::Get { from, last: Some(from + claimed - 1) }, &url)?;
            self.check_status(&url, &rest, Some(file))?;
            if rest.status() != 206 {
                return Err(invalid(&url, "a part of the file the first time and all of it the second"));
            }
            begin_of_range(&url, &rest, from)?;
            rest
        } else {
            response
        };
        begin.resize(LENGTH_BYTES + claimed as usize, 0);
        rest.body_mut().as_reader().read_exact(&mut begin[LENGTH_BYTES..]).map_err(interrupted)?;
        Ok((begin, size))
    }

    fn file_url(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.repo, quote(file, true))
    }

    /// Sends a request and follows redirects; a `Head` only those on the hub itself.
    fn send(&self, method: Method, url: &str) -> Result<Response<Body>, HubError> {
        let mut url = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let origin = Origin::of(&url).ok_or_else(|| invalid(&url, "a redirect to no web address"))?;
            if self.origin.secure && !origin.secure {
                return Err(invalid(&url, "a redirect from https to http"));
            }
            let mut request = match method {
                Method::Head => self.agent.head(&url),
                Method::Get { .. } => self.agent.get(&url),
            };
            request = request.header("Accept-Encoding", "identity");
            match method {
                Method::Get { from, last: Some(last) } => {
                    request = request.header("Range", format!("bytes={from}-{last}"));
                }
                Method::Get { from: from @ 1.., last: None } => {
                    request = request.header("Range", format!("bytes={from}-"));
                }
                _ => {}
            }
            if let (Some(token), true) = (&self.options.token, origin == self.origin) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| HubError::Unreachable {
                host: origin.host.clone(),
                reason: error.to_string(),
            })?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = header(&response, "location")
                .and_then(|location| join(&url, &location))
                .ok_or_else(|| invalid(&url, "a redirect to no web address"))?;
            let leaves = Origin::of(&location).as_ref() != Some(&self.origin);
            if matches!(method, Method::Head) && leaves {
                return Ok(response);
            }
            url = location;
        }
        Err(invalid(&url, "too many redirects"))
    }

    /// Errors where the status is not success, with what the hub says the reason is.
    fn check_status(&self, url: &str, response: &Response<Body>, file: Option<&str>) -> Result<(), HubError> {
        let status = response.status().as_u16();
        if response.status().is_success() {
            return Ok(());
        }
        let repo = self.repo.to_string();
        let hint = || {
            let cached = cached_repos(&self.options.cache_dir);
            did_you_mean(self.repo, cached.iter().map(String::as_str))
        };
        let code = header(response, "x-error-code").unwrap_or_default();
        Err(match (status, code.as_str(), file) {
            (404, "RevisionNotFound", _) => {
                HubError::RevisionNotFound { repo, revision: self.revision.to_string() }
            }
            (404, "RepoNotFound", _) | (404, _, None) => HubError::RepoNotFound { repo, hint: hint() },
            (404, _, Some(file)) => HubError::FileNotFound { repo, file: file.to_string() },
            (401 | 403, _, _) if self.options.token.is_some() => HubError::AccessDenied { repo, status },
            (401 | 403, _, _) => HubError::TokenNeeded { repo, status, hint: hint() },
            _ => HubError::UnexpectedStatus { url: printable(url), status },
        })
    }
}

#[derive(Clone, Copy)]
enum Method {
    Head,
    /// Bytes `from` to `last`, or to the end.
    Get {
        from: u64,
        last: Option<u64>,
    },
}

/// The first byte of a partial answer, which must be `from`.
fn begin_of_range(url: &str, response: &Response<Body>, from: u64) -> Result<u64, HubError> {
    let range = header(response, "content-range").unwrap_or_default();
    let begin = range.strip_prefix("bytes ").and_then(|range| range.split('-').next()?.parse().ok());
    begin.filter(|&begin: &u64| begin == from).ok_or_else(|| invalid(url, "another range than was asked for"))
}

pub(super) fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.trim().to_string())
}

pub(super) fn read_json<T: DeserializeOwned>(
    url: &str,
    response: &mut Response<Body>,
) -> Result<T, HubError> {
    let body = response.body_mut().with_config().limit(MAX_INFO_BYTES).read_to_vec();
    let body =
        body.map_err(|error| HubError::Interrupted { file: printable(url), reason: error.to_string() })?;
    serde_json::from_slice(&body).map_err(|error| invalid(url, &error.to_string()))
}

pub(super) fn invalid(url: &str, reason: &str) -> HubError {
    HubError::InvalidResponse { url: printable(url), reason: reason.to_string() }
}

/// An address without what may be secret in it: signatures after `?`, and user names.
pub(super) fn printable(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.rsplit('@').next().unwrap_or_default();
    if scheme.is_empty() { rest.to_string() } else { format!("{scheme}://{rest}") }
}

/// The address to which a redirect at `url` leads; `None` for relative paths, which the hub never sends.
pub(super) fn join(url: &str, location: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    if location.starts_with("//") {
        Some(format!("{scheme}:{location}"))
    } else if location.starts_with('/') {
        let authority = rest.split(['/', '?', '#']).next()?;
        Some(format!("{scheme}://{authority}{location}"))
    } else {
        location.contains("://").then(|| location.to_string())
    }
}

/// Percent-encodes everything but letters, digits, `-._~`, and where `path` is true the slash.
pub(super) fn quote(text: &str, path: bool) -> String {
    let mut quoted = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (path && byte == b'/') {
            quoted.push(char::from(byte));
        } else {
            quoted.push_str(&format!("%{byte:02X}"));
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_agree_in_scheme_host_and_port() {
        let same = |a, b| Origin::of(a).is_some() && Origin::of(a) == Origin::of(b);
        assert!(same("https://hub.co/a", "https://HUB.co:443/b?c"));
        assert!(!same("https://hub.co", "http://hub.co"));
        assert!(!same("http://hub.co:80", "http://hub.co:81"));
        assert!(!same("https://hub.co", "https://hub.co.evil.net"));
        for url in ["hub.co", "ftp://hub.co", "https://user:word@hub.co", "https:///x"] {
            assert!(Origin::of(url).is_none(), "{url}");
        }
    }

    #[test]
    fn addresses_are_quoted_joined_and_printed() {
        assert_eq!(quote("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(quote("a b/ü.json", true), "a%20b/%C3%BC.json");
        assert_eq!(join("https://h:1/a?b", "/c").as_deref(), Some("https://h:1/c"));
        assert_eq!(join("https://h/a", "//cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(join("https://h/a", "http://cdn/c").as_deref(), Some("http://cdn/c"));
        assert_eq!(join("https://h/a", "c"), None);
        assert_eq!(printable("https://cdn/x?Signature=secret"), "https://cdn/x");
        assert_eq!(printable("user:secret@h/x"), "h/x");
        assert_eq!(printable("https://user:secret@h/x"), "https://h/x");
    }
}
