//! Requests that send something: bodies streamed from disk, tries repeated where that can help, and refusals put into
//! words. The token goes to the hub's own host alone, and no message holds it or a signed address.

use std::io::{self, Read};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::Response;
use ureq::{Body, RequestBuilder, SendBody};

use super::RETRIES;
use super::client::{Client, MAX_REDIRECTS, Origin, header, invalid, join, printable, read_json};
use super::error::HubError;

/// The longest wait that a server may ask for before the next try.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(120);
/// A commit of many files takes the hub a while.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REASON_BYTES: u64 = 64 << 10;
const MAX_REASON_CHARS: usize = 300;

/// What a request sends.
pub(super) struct Outgoing<'a> {
    /// Its method.
    pub(super) method: Method,
    /// The address.
    pub(super) url: &'a str,
    /// Whether the hub needs to know who asks: false for addresses that carry their own signature.
    pub(super) signed_in: bool,
    /// Headers besides `Content-Length` and the token.
    pub(super) headers: &'a [(String, String)],
    /// Bytes of the body.
    pub(super) length: u64,
    /// Opens the body at its beginning, again for every try.
    pub(super) body: &'a mut dyn FnMut() -> io::Result<Box<dyn Read + 'a>>,
    /// What it is, for messages.
    pub(super) what: &'a str,
}

/// How something is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
    Put,
}

impl Client<'_> {
    /// Posts `value` as JSON to an address of the hub and reads the JSON of the answer.
    pub(super) fn post_json<T: DeserializeOwned>(
        &self,
        url: &str,
        value: &impl Serialize,
        media_type: &str,
        what: &str,
    ) -> Result<T, HubError> {
        let bytes = serde_json::to_vec(value).map_err(|error| invalid(url, &error.to_string()))?;
        let mut response = self.post(url, &bytes, media_type, true, what)?;
        self.require_success(url, &mut response)?;
        read_json(url, &mut response)
    }

    /// Posts `bytes`; every status that a further try could not change is returned.
    pub(super) fn post(
        &self,
        url: &str,
        bytes: &[u8],
        media_type: &str,
        signed_in: bool,
        what: &str,
    ) -> Result<Response<Body>, HubError> {
        let headers = ["Content-Type", "Accept"].map(|name| (name.to_string(), media_type.to_string()));
        let bytes = bytes.to_vec();
        self.persist(Outgoing {
            method: Method::Post,
            url,
            signed_in,
            headers: &headers,
            length: bytes.len() as u64,
            body: &mut || Ok(Box::new(io::Cursor::new(bytes.clone()))),
            what,
        })
    }

    /// Gets what the hub says about something.
    pub(super) fn get(&self, url: &str, what: &str) -> Result<Response<Body>, HubError> {
        self.persist(Outgoing {
            method: Method::Get,
            url,
            signed_in: true,
            headers: &[],
            length: 0,
            body: &mut || Ok(Box::new(io::empty())),
            what,
        })
    }

    /// Sends until there is an answer that a further try would not change: after lost connections, 5xx, and 429 with a
    /// `Retry-After`, it tries again, waiting longer each time or as long as the server says.
    pub(super) fn persist(&self, mut outgoing: Outgoing<'_>) -> Result<Response<Body>, HubError> {
        let mut tries = 0;
        loop {
            let result = self.exchange(&mut outgoing);
            let pause = match &result {
                Ok(response) => {
                    let asked = retry_after(response);
                    let status = response.status().as_u16();
                    if status < 500 && !(status == 429 && asked.is_some()) {
                        return result;
                    }
                    asked
                }
                Err(HubError::SendFailed { .. }) => None,
                Err(_) => return result,
            };
            if tries == RETRIES {
                return result;
            }
            thread::sleep(pause.unwrap_or(Duration::from_millis(200 << tries)));
            tries += 1;
        }
    }

    /// One try, redirects followed: the token stays with the hub, and the body is sent again only where the status says
    /// so.
    fn exchange(&self, outgoing: &mut Outgoing<'_>) -> Result<Response<Body>, HubError> {
        let mut url = outgoing.url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let origin = Origin::of(&url).ok_or_else(|| invalid(&url, "no web address"))?;
            if self.origin.secure && !origin.secure {
                return Err(invalid(&url, "an address without https"));
            }
            let mut headers = outgoing.headers.to_vec();
            if let (Some(token), true, true) =
                (&self.options.token, outgoing.signed_in, origin == self.origin)
            {
                headers.push(("Authorization".to_string(), format!("Bearer {token}")));
            }
            let failed = |reason: String| HubError::SendFailed {
                what: outgoing.what.to_string(),
                host: origin.host.clone(),
                reason,
            };
            let response = match outgoing.method {
                Method::Get => with_headers(self.agent.get(&url), &headers).call(),
                Method::Post | Method::Put => {
                    let mut body = (outgoing.body)().map_err(|error| failed(error.to_string()))?;
                    let request = match outgoing.method {
                        Method::Post => self.agent.post(&url),
                        _ => self.agent.put(&url),
                    };
                    with_headers(request, &headers)
                        .header("Content-Length", outgoing.length.to_string())
                        .config()
                        .timeout_recv_response(Some(ANSWER_TIMEOUT))
                        .timeout_per_write(Some(WRITE_TIMEOUT))
                        .build()
                        .send(SendBody::from_reader(&mut body))
                }
            };
            let response = response.map_err(|error| failed(error.to_string()))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            if !matches!(response.status().as_u16(), 307 | 308) {
                return Err(invalid(&url, "a redirect that would lose what is sent"));
            }
            url = header(&response, "location")
                .and_then(|location| join(&url, &location))
                .ok_or_else(|| invalid(&url, "a redirect to no web address"))?;
        }
        Err(invalid(&url, "too many redirects"))
    }

    /// Errors where the hub did not do what it was asked for, with its reason.
    pub(super) fn require_success(&self, url: &str, response: &mut Response<Body>) -> Result<(), HubError> {
        let status = response.status().as_u16();
        if response.status().is_success() {
            return Ok(());
        }
        if Origin::of(url).as_ref() != Some(&self.origin) {
            // The storage knows nothing of tokens and branches, and its words may repeat a signature.
            return Err(HubError::Rejected { url: printable(url), status, reason: String::new() });
        }
        let (repo, revision) = (self.repo.to_string(), self.revision.to_string());
        let code = header(response, "x-error-code").unwrap_or_default();
        let reason = self.reason(response);
        Err(match (status, code.as_str()) {
            (401, _) => HubError::TokenRefused { repo, reason },
            (403, _) => HubError::WriteDenied { repo, reason },
            (404, "RevisionNotFound") => HubError::BranchMissing { repo, revision },
            (404, _) => HubError::RepoMissing { repo },
            (412, _) => HubError::BranchMoved { repo, revision },
            _ => HubError::Rejected { url: printable(url), status, reason },
        })
    }

    /// What the hub gives as reason, as ` (…)` or nothing, without the token.
    fn reason(&self, response: &mut Response<Body>) -> String {
        let said = header(response, "x-error-message").or_else(|| {
            let body = response.body_mut().with_config().limit(MAX_REASON_BYTES).read_to_vec().ok()?;
            let json: serde_json::Value = serde_json::from_slice(&body).ok()?;
            ["error", "message"].iter().find_map(|key| Some(json.get(*key)?.as_str()?.to_string()))
        });
        let mut said: String = said.unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
        if let Some(token) = &self.options.token {
            said = said.replace(token.as_str(), "…");
        }
        match said.trim().chars().take(MAX_REASON_CHARS).collect::<String>() {
            empty if empty.is_empty() => empty,
            said => format!(" ({said})"),
        }
    }
}

fn with_headers<B>(request: RequestBuilder<B>, headers: &[(String, String)]) -> RequestBuilder<B> {
    headers.iter().fold(request, |request, (name, value)| request.header(name, value))
}

/// How long the server asks to wait, in whole seconds.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let seconds = header(response, "retry-after")?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}
