//! The hub over HTTP: what a file is (`HEAD`), and its bytes from some offset on (`GET`).
//!
//! Python twin: `huggingface_hub.file_download.get_hf_file_metadata` and `http_get`.

use std::fmt;
use std::io::Read;
use std::time::Duration;

use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RETRY_AFTER};
use ureq::http::{HeaderMap, Method, Request, Response, Uri};
use ureq::{Agent, Body};

use super::Place;
use super::names::{is_commit, is_etag, percent_encoded};
use crate::error::{Error, Result, quoted};

const MAX_REDIRECTS: usize = 8;
const CONNECT: Duration = Duration::from_secs(30);
/// How long a server may be silent.
const SILENCE: Duration = Duration::from_mins(1);
/// The longest that a busy server may make us wait before the next try.
const MAX_WAIT: Duration = Duration::from_mins(1);

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Fault {
    /// Trying again may help, after the time that the server asks for, if it does.
    Passing(String, Option<Duration>),
    /// The server has no bytes from the asked offset on.
    Range,
    Lasting(String),
}

/// What the hub says about a file.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) commit: String,
    pub(super) etag: String,
    pub(super) size: Option<u64>,
}

/// The bytes of a file, from `start` on.
pub(super) struct Incoming {
    pub(super) start: u64,
    /// The whole file's size in bytes.
    pub(super) total: Option<u64>,
    pub(super) body: Box<dyn Read>,
}

/// A connection to one hub.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    /// The `Authorization` header's value, which only the endpoint itself gets to see.
    authorization: Option<Secret>,
}

/// Text that no log may show.
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>) -> Result<Self> {
        let bad = || {
            Error::request(
                "HF_ENDPOINT",
                format!("{} is no http(s) address of a hub", quoted(endpoint)),
            )
        };
        let endpoint: Uri = endpoint.trim_end_matches('/').parse().map_err(|_| bad())?;
        if !matches!(endpoint.scheme_str(), Some("http" | "https")) || endpoint.query().is_some() {
            return Err(bad());
        }
        let host = endpoint.host().ok_or_else(bad)?;
        if token
            .as_ref()
            .is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err(Error::request(
                "HF_TOKEN",
                "is no token: it has characters that no token has",
            ));
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where the token can be kept back and downgrades refused.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("tronie/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE));
        // A proxy could not reach this machine's own ports.
        if matches!(host, "localhost" | "127.0.0.1" | "[::1]") {
            config = config.proxy(None);
        }
        let authorization = token.map(|token| Secret(format!("Bearer {token}")));
        Ok(Self {
            agent: config.build().into(),
            endpoint,
            authorization,
        })
    }

    /// Asks what the file is now, without its contents.
    pub(super) fn describe(&self, place: Place<'_>) -> Result<Remote, Fault> {
        let mut uri = self.uri(place)?;
        let (mut commit, mut etag, mut size) = (None, None, None);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&Method::HEAD, &uri, 0)?;
            let header = |name: &str| text(response.headers(), name);
            commit = header("x-repo-commit").or(commit);
            etag = header("x-linked-etag").or(etag);
            size = header("x-linked-size").or(size);
            if response.status().is_redirection() {
                // Only to where a renamed repository went. The storage behind the hub knows nothing of the hub's hashes.
                let next = redirect(&uri, response.headers())?;
                if same_origin(&next, &uri) {
                    uri = next;
                    continue;
                }
            } else if !response.status().is_success() {
                return Err(self.refused(place, &response));
            } else {
                size = size.or_else(|| header(CONTENT_LENGTH.as_str()));
            }
            let etag = etag.or_else(|| header(ETAG.as_str()));
            return remote(place, commit, etag, size);
        }
        Err(Fault::Lasting("the server redirects in a circle".into()))
    }

    /// Asks for the file's bytes from `offset` on. The answer may start at 0 all the same.
    pub(super) fn fetch(&self, place: Place<'_>, offset: u64) -> Result<Incoming, Fault> {
        let mut uri = self.uri(place)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&Method::GET, &uri, offset)?;
            if response.status().is_redirection() {
                uri = redirect(&uri, response.headers())?;
                continue;
            }
            return match response.status().as_u16() {
                200 => Ok(Incoming {
                    start: 0,
                    total: text(response.headers(), CONTENT_LENGTH.as_str())
                        .and_then(|n| n.parse().ok()),
                    body: Box::new(response.into_body().into_reader()),
                }),
                206 => {
                    let (start, total) = content_range(response.headers())?;
                    Ok(Incoming {
                        start,
                        total,
                        body: Box::new(response.into_body().into_reader()),
                    })
                }
                416 => Err(Fault::Range),
                _ => Err(self.refused(place, &response)),
            };
        }
        Err(Fault::Lasting("the server redirects in a circle".into()))
    }

    fn uri(
        &self,
        Place {
            repo,
            file,
            revision,
        }: Place<'_>,
    ) -> Result<Uri, Fault> {
        let endpoint = self.endpoint.to_string();
        let (file, revision) = (percent_encoded(file, "/"), percent_encoded(revision, ""));
        let uri = format!(
            "{}/{repo}/resolve/{revision}/{file}",
            endpoint.trim_end_matches('/')
        );
        uri.parse()
            .map_err(|e| Fault::Lasting(format!("{uri} is no address: {e}")))
    }

    fn send(&self, method: &Method, uri: &Uri, offset: u64) -> Result<Response<Body>, Fault> {
        let mut request = Request::builder().method(method).uri(uri);
        if offset > 0 {
            request = request.header("Range", format!("bytes={offset}-"));
        }
        if let Some(authorization) = self
            .authorization
            .as_ref()
            .filter(|_| same_origin(uri, &self.endpoint))
        {
            request = request.header("Authorization", &authorization.0);
        }
        let request = request
            .body(())
            .map_err(|e| Fault::Lasting(e.to_string()))?;
        self.agent
            .run(request)
            .map_err(|e| self.unreachable(uri, &e))
    }

    fn unreachable(&self, uri: &Uri, error: &ureq::Error) -> Fault {
        let host = uri.host().or(self.endpoint.host()).unwrap_or_default();
        let reason = format!(
            "{host} cannot be reached ({error}): check the connection and the proxy settings, or set HF_ENDPOINT to a \
             mirror"
        );
        match error {
            ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                Fault::Lasting(reason)
            }
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => {
                Fault::Passing(reason, None)
            }
            _ => Fault::Lasting(reason),
        }
    }

    /// The server's refusal in words. The hub tells apart what HTTP's status does not in `X-Error-Code`.
    fn refused(&self, place: Place<'_>, response: &Response<Body>) -> Fault {
        let Place { repo, revision, .. } = place;
        let status = response.status().as_u16();
        let page = format!("{}/{repo}", self.endpoint.to_string().trim_end_matches('/'));
        let token = if self.authorization.is_some() {
            "the token that is set may have expired, or may not read this repository"
        } else {
            "then set HF_TOKEN to a token that may read it, or run `hf auth login`"
        };
        let reason = match (status, text(response.headers(), "x-error-code").as_deref()) {
            (_, Some("RepoNotFound")) | (404, None) => format!(
                "not found (HTTP {status}): there is no such repository or file, or it is private and HF_TOKEN may not read \
                 it; check the names at {page}"
            ),
            (_, Some("RevisionNotFound")) => {
                format!(
                    "not found (HTTP {status}): the repository has no revision {}",
                    quoted(revision)
                )
            }
            (404, Some(_)) => {
                format!(
                    "not found (HTTP 404): the repository has no such file at revision {}",
                    quoted(revision)
                )
            }
            (401 | 403, _) => format!(
                "access denied (HTTP {status}): the model is gated or private; accept its licence at {page}, {token}"
            ),
            (408 | 429 | 500..=599, _) => {
                let asked =
                    text(response.headers(), RETRY_AFTER.as_str()).and_then(|s| s.parse().ok());
                let wait = asked.map(|seconds| Duration::from_secs(seconds).min(MAX_WAIT));
                return Fault::Passing(
                    format!("the server is busy or broken (HTTP {status}): try again later"),
                    wait,
                );
            }
            _ => format!("the server answers HTTP {status}; look at {page}"),
        };
        Fault::Lasting(reason)
    }
}

fn remote(
    place: Place<'_>,
    commit: Option<String>,
    etag: Option<String>,
    size: Option<String>,
) -> Result<Remote, Fault> {
    // These two become names in the cache.
    let unusable = |what: &str| {
        Fault::Lasting(format!(
            "the server gives no usable {what}: is HF_ENDPOINT a hub?"
        ))
    };
    let commit = commit
        .or_else(|| is_commit(place.revision).then(|| place.revision.to_owned()))
        .filter(|commit| is_commit(commit))
        .ok_or_else(|| unusable("commit (X-Repo-Commit)"))?;
    let etag = etag
        .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned())
        .filter(|etag| is_etag(etag))
        .ok_or_else(|| unusable("hash (ETag)"))?;
    let size = size
        .map(|size| size.parse().map_err(|_| unusable("size")))
        .transpose()?;
    Ok(Remote { commit, etag, size })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers
        .get(name)?
        .to_str()
        .ok()
        .map(|value| value.trim().to_owned())
}

/// Start and total of `bytes START-END/TOTAL`.
fn content_range(headers: &HeaderMap) -> Result<(u64, Option<u64>), Fault> {
    let parse = || {
        let value = text(headers, CONTENT_RANGE.as_str())?;
        let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
        let (start, _) = range.split_once('-')?;
        Some((start.trim().parse().ok()?, total.trim().parse().ok()))
    };
    parse().ok_or_else(|| {
        Fault::Lasting("the server does not say which part it sends (Content-Range)".into())
    })
}

fn redirect(from: &Uri, headers: &HeaderMap) -> Result<Uri, Fault> {
    let bad = |what: &str| Fault::Lasting(format!("the server redirects to {what}"));
    let location = text(headers, LOCATION.as_str()).ok_or_else(|| bad("nowhere"))?;
    let location = match (location.strip_prefix("//"), from.scheme_str()) {
        (Some(rest), Some(scheme)) => format!("{scheme}://{rest}"),
        _ => location,
    };
    let to: Uri = location.parse().map_err(|_| bad("no address"))?;
    let to = if to.host().is_none() && location.starts_with('/') {
        let mut parts = from.clone().into_parts();
        parts.path_and_query = to.into_parts().path_and_query;
        Uri::from_parts(parts).map_err(|_| bad("no address"))?
    } else {
        to
    };
    match (from.scheme_str(), to.scheme_str()) {
        (_, Some("https")) | (Some("http"), Some("http")) => Ok(to),
        (_, Some("http")) => Err(bad("an unprotected address (http), which is not followed")),
        _ => Err(bad("an address that is not http(s), which is not followed")),
    }
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let origin = |uri: &Uri| {
        (
            uri.scheme_str().map(str::to_owned),
            uri.host().map(str::to_owned),
            uri.port_u16(),
        )
    };
    origin(a) == origin(b)
}

#[cfg(test)]
mod tests {
    use ureq::http::{HeaderMap, HeaderValue, Uri, header::LOCATION};

    use super::{redirect, same_origin};

    fn redirected(from: &str, to: &str) -> Option<Uri> {
        let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_str(to).unwrap())]);
        redirect(&from.parse().unwrap(), &headers).ok()
    }

    // Needs a server with a certificate otherwise.
    #[test]
    fn redirects_never_leave_encryption() {
        assert_eq!(redirected("https://hub/a", "http://hub/a"), None);
        assert_eq!(
            redirected("https://hub/a", "//cdn/b").unwrap(),
            "https://cdn/b"
        );
        assert_eq!(
            redirected("https://hub/a", "/b?c").unwrap(),
            "https://hub/b?c"
        );
        assert_eq!(
            redirected("http://hub/a", "https://cdn/b").unwrap(),
            "https://cdn/b"
        );
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://hub/a", "https://hub/b?c"));
        for other in [
            "http://hub/a",
            "https://hub:444/a",
            "https://hub.evil/a",
            "https://evil/hub",
        ] {
            assert!(!same("https://hub/a", other), "{other}");
        }
    }
}
