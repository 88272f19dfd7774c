//! Parses containerd's addresses for a process's streams: a path or a URI. Pure.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::stdio::error::StdioError;

/// Where a process's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Destination {
    /// Nowhere: the request asks for no output.
    Nowhere,
    /// A fifo that containerd's client created, or another file that exists.
    Path(PathBuf),
    /// A file to append to, created if it does not exist.
    File(PathBuf),
    /// A logging program (containerd, core/runtime/v2/README.md, "Logging").
    Binary {
        /// The program.
        path: PathBuf,
        /// Its arguments: each key of the query, followed by its value.
        args: Vec<OsString>,
    },
}

impl Destination {
    /// Parses `value`, the address in the request's `field`.
    ///
    /// # Errors
    /// [`StdioError::Scheme`] for an unsupported kind, [`StdioError::Address`] for one without an absolute path.
    pub(super) fn parse(field: &'static str, value: &str) -> Result<Self, StdioError> {
        if value.is_empty() {
            return Ok(Self::Nowhere);
        }
        let Some((scheme, rest)) = value.split_once("://") else { return Ok(Self::Path(value.into())) };
        let rest = rest.split('#').next().unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let malformed = |problem| StdioError::Address { field, value: value.to_owned(), problem };
        // containerd ignores a host before the path, and so does husk.
        let path = || {
            let path = place.find('/').map(|start| &place[start..]).ok_or(malformed("has no absolute path"))?;
            unescape(path, false).map(PathBuf::from).ok_or(malformed("has a % that escapes no character"))
        };
        match scheme {
            "fifo" => Ok(Self::Path(path()?)),
            "file" => Ok(Self::File(path()?)),
            "binary" => {
                let args = arguments(query).ok_or(malformed("has a % that escapes no character"))?;
                Ok(Self::Binary { path: path()?, args })
            }
            scheme => Err(StdioError::Scheme { field, value: value.to_owned(), scheme: scheme.to_owned() }),
        }
    }
}

/// The path of the fifo at `address`: a bare path, or `fifo://` and a path.
///
/// # Errors
/// [`StdioError::Scheme`].
pub(super) fn input_fifo(address: &str) -> Result<&Path, StdioError> {
    match address.split_once("://") {
        None => Ok(Path::new(address)),
        Some(("fifo", path)) => Ok(Path::new(path)),
        Some((scheme, _)) => {
            Err(StdioError::Scheme { field: "stdin", value: address.to_owned(), scheme: scheme.to_owned() })
        }
    }
}

/// A logging program's arguments from the query. None if its encoding is broken.
fn arguments(query: &str) -> Option<Vec<OsString>> {
    let mut args: Vec<OsString> = Vec::new();
    let mut keys = HashSet::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (unescape(key, true)?, unescape(value, true)?);
        // Like containerd: the first value of a repeated key.
        if keys.insert(key.clone()) {
            args.extend([key, value]);
        }
    }
    Some(args)
}

/// Decodes percent-encoding, and in a query also `+` as a space (RFC 3986, section 2.1; HTML's form encoding). None if
/// the encoding is broken.
fn unescape(text: &str, query: bool) -> Option<OsString> {
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16));
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    // A zero byte would end the path or argument early.
    (!plain.contains(&0)).then(|| OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_addresses() {
        let binary = |path: &str, args: &[&str]| Destination::Binary {
            path: path.into(),
            args: args.iter().map(OsString::from).collect(),
        };
        let table = [
            ("", Ok(Destination::Nowhere)),
            ("/run/a/stdout", Ok(Destination::Path("/run/a/stdout".into()))),
            ("/run/100%/out", Ok(Destination::Path("/run/100%/out".into()))),
            ("fifo:///run/a", Ok(Destination::Path("/run/a".into()))),
            ("file:///tmp/a%20log", Ok(Destination::File("/tmp/a log".into()))),
            ("file://localhost/tmp/log?x=y#z", Ok(Destination::File("/tmp/log".into()))),
            ("binary:///usr/bin/logger", Ok(binary("/usr/bin/logger", &[]))),
            (
                "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=/var/lib/nerdctl/19&b&b=2&c=a+b%26",
                Ok(binary(
                    "/usr/bin/nerdctl",
                    &["_NERDCTL_INTERNAL_LOGGING", "/var/lib/nerdctl/19", "b", "", "c", "a b&"],
                )),
            ),
            ("binary://logger", Err("stdout \"binary://logger\" has no absolute path")),
            ("file:///tmp/%zz", Err("stdout \"file:///tmp/%zz\" has a % that escapes no character")),
            ("file:///tmp/a%00b", Err("stdout \"file:///tmp/a%00b\" has a % that escapes no character")),
            (
                "npipe://./pipe/x",
                Err("stdout \"npipe://./pipe/x\": fifos, file:// and binary:// are supported, npipe:// is not"),
            ),
        ];
        for (value, expected) in table {
            let parsed = Destination::parse("stdout", value).map_err(|error| error.to_string());
            assert_eq!(parsed, expected.map_err(str::to_owned), "{value}");
        }
    }

    #[test]
    fn input_addresses() {
        let table = [
            ("/run/a/stdin", Ok("/run/a/stdin")),
            ("fifo:///run/a", Ok("/run/a")),
            ("file:///tmp/in", Err("stdin \"file:///tmp/in\": only fifos are supported, file:// is not")),
        ];
        for (value, expected) in table {
            let parsed = input_fifo(value).map_err(|error| error.to_string());
            assert_eq!(parsed, expected.map(Path::new).map_err(str::to_owned), "{value}");
        }
    }
}
