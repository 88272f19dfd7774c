//! Where a process's output is to go, as containerd writes it: a path, or a URI. Pure.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::stdio::Error;

/// A kind of place for output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Nobody wants it.
    Nowhere,
    /// A fifo that containerd's client has made, or another file that is there.
    Path(PathBuf),
    /// A file that is made if it is not there, and appended to.
    File(PathBuf),
    /// A program that takes it (containerd, core/runtime/v2/README.md, "Logging").
    Binary {
        /// The program.
        path: PathBuf,
        /// Its arguments: each of the query's keys, and then its value.
        args: Vec<OsString>,
    },
}

impl Destination {
    /// What `value`, the request's `field`, stands for.
    ///
    /// # Errors
    /// With field and value, when it is of no kind that husk knows, or names no absolute path.
    pub fn parse(field: &'static str, value: &str) -> Result<Self, Error> {
        if value.is_empty() {
            return Ok(Self::Nowhere);
        }
        let Some((scheme, rest)) = value.split_once("://") else { return Ok(Self::Path(value.into())) };
        let rest = rest.split('#').next().unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let wrong = |problem| Error::Address { field, value: value.to_owned(), problem };
        // What stands before the path would be a host, which means nothing here and to containerd.
        let path = || {
            let path = place.find('/').map(|start| &place[start..]).ok_or(wrong("has no absolute path"))?;
            unescape(path, false).map(PathBuf::from).ok_or(wrong("has a % that escapes no character"))
        };
        match scheme {
            "fifo" => Ok(Self::Path(path()?)),
            "file" => Ok(Self::File(path()?)),
            "binary" => {
                let mut args: Vec<OsString> = Vec::new();
                let mut keys = std::collections::HashSet::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    let (Some(key), Some(value)) = (unescape(key, true), unescape(value, true)) else {
                        return Err(wrong("has a % that escapes no character"));
                    };
                    // Of several values of a key containerd passes the first.
                    if keys.insert(key.clone()) {
                        args.extend([key, value]);
                    }
                }
                Ok(Self::Binary { path: path()?, args })
            }
            scheme => Err(Error::Scheme { field, value: value.to_owned(), scheme: scheme.to_owned() }),
        }
    }
}

/// Undoes percent-encoding, and in a query that of the space (RFC 3986, section 2.1; HTML's form encoding). None if it is broken.
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
    // A zero byte ends a path and an argument: what would be behind it is not what was written.
    (!plain.contains(&0)).then(|| OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_output() {
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
        for (value, wanted) in table {
            let got = Destination::parse("stdout", value).map_err(|error| error.to_string());
            assert_eq!(got, wanted.map_err(str::to_owned), "{value}");
        }
    }
}
