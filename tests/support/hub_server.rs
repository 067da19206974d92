//! A hub on 127.0.0.1: an HTTP server whose every answer is written by the test, broken ones included.
#![allow(dead_code)] // Each test file uses a part of it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// The commit that the servers of these tests are at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a client asked.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub offset: Option<usize>,
    pub token: Option<String>,
}

/// What it gets: the connection ends after `body`, whatever `headers` promise.
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn new(status: u16, body: &[u8]) -> Self {
        Self {
            status,
            headers: vec![],
            body: body.to_owned(),
        }
        .with("Content-Length", body.len())
    }

    /// Adds a header, in the place of one of the same name.
    #[allow(clippy::needless_pass_by_value)] // Text and numbers alike, as they come.
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.retain(|(other, _)| *other != name);
        self.headers.push((name, value.to_string()));
        self
    }

    /// Sends no more than `count` bytes of the body.
    pub fn cut(mut self, count: usize) -> Self {
        self.body.truncate(count);
        self
    }
}

/// A running server; it ends with the test process.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (Arc::clone(&seen), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream.unwrap(), &log, &*answer));
            }
        });
        Self { url, seen }
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, answer: &dyn Fn(&Seen) -> Reply) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_owned);
    let mut seen = Seen {
        method: words.next().unwrap(),
        path: words.next().unwrap(),
        offset: None,
        token: None,
    };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                seen.offset = value
                    .strip_prefix("bytes=")
                    .and_then(|r| r.strip_suffix('-')?.parse().ok());
            }
            "authorization" => seen.token = Some(value.to_owned()),
            _ => {}
        }
    }
    let reply = answer(&seen);
    let head = seen.method == "HEAD";
    log.lock().unwrap().push(seen);
    let mut bytes = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", reply.status).into_bytes();
    for (name, value) in &reply.headers {
        bytes.extend(format!("{name}: {value}\r\n").into_bytes());
    }
    bytes.extend(b"\r\n");
    if !head {
        bytes.extend(&reply.body);
    }
    // The client may have gone; that is its right.
    let _ = stream.write_all(&bytes);
}

/// What the hub and its storage answer for a large file, in one server: hash and size at once, ranges honoured.
pub fn large_file(seen: &Seen, content: &[u8]) -> Reply {
    let start = seen.offset.unwrap_or(0);
    let reply = match content.get(start..) {
        Some(rest) if seen.offset.is_some() => {
            let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
            Reply::new(206, rest).with("Content-Range", range)
        }
        Some(rest) => Reply::new(200, rest),
        None => Reply::new(416, b""),
    };
    described(reply, &sha256(content), content.len())
}

/// Adds what the hub says of a large file.
pub fn described(reply: Reply, etag: &str, size: usize) -> Reply {
    reply
        .with("X-Repo-Commit", COMMIT)
        .with("X-Linked-ETag", format!("\"{etag}\""))
        .with("X-Linked-Size", size)
}

/// The hexadecimal SHA-256.
pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .concat()
}
