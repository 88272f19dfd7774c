//! A read-only image registry for the tests that pull images: HTTP without TLS, on a loopback address.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// A client that sends or reads nothing for this long is dropped.
const IDLE: Duration = Duration::from_secs(30);
/// Limit for the head of a request.
const MAX_HEAD: u64 = 64 * 1024;

/// The images: a folder with blobs named by digest.
#[derive(Debug)]
pub struct Images {
    folder: PathBuf,
    tags: HashMap<String, String>,
}

impl Images {
    /// Reads a folder of images: `tests/suites/images/build` and `tests/kubernetes/images/build` make one.
    pub fn open(folder: &Path) -> Result<Self> {
        let list = folder.join("tags");
        let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        let tags =
            text.lines().filter_map(|line| line.split_once(' ')).map(|(tag, digest)| (tag.into(), digest.into()));
        Ok(Self { folder: folder.into(), tags: tags.collect() })
    }

    /// The digest of `NAME:TAG`.
    pub fn digest(&self, tag: &str) -> Result<&str> {
        self.tags.get(tag).map(String::as_str).with_context(|| format!("no image {tag}"))
    }

    /// The digest and content of `/v2/NAME/manifests/TAG-OR-DIGEST` or `/v2/NAME/blobs/DIGEST`.
    fn resource(&self, path: &str) -> Option<(String, Vec<u8>)> {
        let (rest, reference) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
        let (name, _kind) = rest.rsplit_once('/')?;
        let digest = match reference.strip_prefix("sha256:") {
            Some(_) => reference,
            None => self.tags.get(&format!("{name}:{reference}"))?,
        };
        let file = digest.strip_prefix("sha256:").filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        Some((digest.to_owned(), fs::read(self.folder.join(file)).ok()?))
    }

    /// The complete response to a request for `path`.
    fn response(&self, method: &str, path: &str) -> Vec<u8> {
        let path = path.split('?').next().unwrap_or_default();
        let (status, digest, body) = match self.resource(path) {
            Some((digest, body)) => ("200 OK", digest, body),
            None if path == "/v2/" => ("200 OK", String::new(), b"{}".to_vec()),
            None => ("404 Not Found", String::new(), br#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#.to_vec()),
        };
        let kind = match path.contains("/manifests/") {
            true => media_type(&body),
            false => "application/octet-stream".into(),
        };
        let digest = if digest.is_empty() { digest } else { format!("Docker-Content-Digest: {digest}\r\n") };
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\n{digest}Content-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        let body = if method == "HEAD" { Vec::new() } else { body };
        [head.into_bytes(), body].concat()
    }
}

/// The media type that a manifest declares.
fn media_type(manifest: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
    value["mediaType"].as_str().unwrap_or("application/json").to_owned()
}

/// Serves the images on this socket until the process ends.
pub fn serve(listener: TcpListener, images: Arc<Images>) {
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let images = Arc::clone(&images);
            // What a client breaks off, its test reports.
            thread::spawn(move || drop(answer(client, &images)));
        }
    });
}

fn answer(mut client: TcpStream, images: &Images) -> std::io::Result<()> {
    client.set_read_timeout(Some(IDLE))?;
    client.set_write_timeout(Some(IDLE))?;
    let mut head = BufReader::new((&client).take(MAX_HEAD));
    let mut request = String::new();
    head.read_line(&mut request)?;
    let mut line = String::new();
    while head.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    client.write_all(&images.response(method, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_served_by_tag_and_digest_with_its_type() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tags"), "a/b:1 sha256:0a\n").unwrap();
        fs::write(folder.path().join("0a"), r#"{"mediaType":"x/y"}"#).unwrap();
        let images = Images::open(folder.path()).unwrap();
        assert_eq!(images.digest("a/b:1").unwrap(), "sha256:0a");
        let text = |method: &str, path: &str| String::from_utf8(images.response(method, path)).unwrap();
        for path in ["/v2/a/b/manifests/1", "/v2/a/b/manifests/sha256:0a?ns=q"] {
            let response = text("GET", path);
            assert!(
                response.starts_with("HTTP/1.1 200 OK\r\nDocker-Content-Digest: sha256:0a\r\nContent-Type: x/y\r\n")
            );
            assert!(response.ends_with("\r\n\r\n{\"mediaType\":\"x/y\"}"), "{response}");
        }
        assert!(text("HEAD", "/v2/a/b/blobs/sha256:0a").ends_with("Content-Length: 19\r\nConnection: close\r\n\r\n"));
        for path in ["/v2/a/b/manifests/2", "/v2/a/b/blobs/sha256:../tags", "/", ""] {
            assert!(text("GET", path).starts_with("HTTP/1.1 404"), "{path}");
        }
    }
}
