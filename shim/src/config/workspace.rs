//! The workspace configuration of a sandbox: what its annotation says, or a file of the host that it names. It may hold secrets, so nothing here
//! shows any of it: not an error, and not a debug print.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use serde::de::IgnoredAny;

/// Most bytes of one.
pub const MOST_BYTES: usize = 256 * 1024;
/// Characters of a file's path that an error shows.
const SHOWN: usize = 200;

/// A workspace configuration, whole.
#[derive(Clone, PartialEq, Eq)]
pub struct Workspace(Arc<[u8]>);

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workspace({} bytes)", self.0.len())
    }
}

impl Workspace {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// What an annotation's value stands for: JSON, or the absolute path of a file under `folder`. No JSON begins with a slash.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or what is allowed; nothing of its content.
    pub fn read(value: &str, folder: Option<&Path>) -> Result<Self, String> {
        if value.starts_with('/') {
            return read_file(Path::new(value), folder).map(|bytes| Self(bytes.into()));
        }
        if value.len() > MOST_BYTES {
            return Err(too_large());
        }
        // serde_json tells the place, and what it expected there.
        let checked = serde_json::from_str::<IgnoredAny>(value);
        checked.map_err(|error| format!("must be JSON, or the absolute path of a file: {error}"))?;
        Ok(Self(value.as_bytes().into()))
    }

    /// What a file that was written by a shim holds.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is larger than any workspace.
    pub fn read_back(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => {
                bounded(file)?.map(|bytes| Some(Self(bytes.into()))).ok_or_else(|| io::Error::other(too_large()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What an error may show of an annotation's value.
pub fn shown(value: &str) -> String {
    if !value.starts_with('/') {
        return format!("({} bytes)", value.len());
    }
    let beginning: String = value.chars().take(SHOWN).collect();
    let more = if beginning.len() < value.len() { "…" } else { "" };
    format!("{beginning:?}{more}")
}

fn too_large() -> String {
    format!("larger than {MOST_BYTES} bytes")
}

fn read_file(path: &Path, folder: Option<&Path>) -> Result<Vec<u8>, String> {
    let Some(folder) = folder else {
        return Err("files are not allowed: workspace_dir is not in husk's configuration".to_owned());
    };
    let outside = || format!("not a file under workspace_dir, {}", folder.display());
    let name = path.strip_prefix(folder).ok().filter(|name| !name.as_os_str().is_empty()).ok_or_else(outside)?;
    let base = open(folder, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|error| format!("open workspace_dir, {}: {}", folder.display(), io::Error::from(error)))?;
    // Beneath the folder whatever the name says and whatever links are on the way, also those that are made meanwhile. O_NONBLOCK: a fifo is not
    // waited for.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(&base, name, how).map(File::from).map_err(|error| match error {
        nix::errno::Errno::EXDEV => outside(),
        error => format!("open it: {}", io::Error::from(error)),
    })?;
    let facts = file.metadata().map_err(|error| format!("look at it: {error}"))?;
    if !facts.is_file() {
        return Err("not a plain file".to_owned());
    }
    bounded(file).map_err(|error| format!("read it: {error}"))?.ok_or_else(too_large)
}

/// All of a file, unless it is too large.
fn bounded(file: File) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= MOST_BYTES).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    const SECRET: &str = "hunter2";

    fn refused(value: &str, folder: Option<&Path>) -> String {
        let why = Workspace::read(value, folder).unwrap_err();
        let text = format!("{} {why}", shown(value));
        assert!(!text.contains(SECRET), "{text}");
        text
    }

    #[test]
    fn json_is_taken_as_it_stands_and_nothing_else_is() {
        for good in ["{}", r#"{ "password":"hunter2" }"#, "[1, 2]", "\"x\"", " 7 "] {
            assert_eq!(Workspace::read(good, None).unwrap().bytes(), good.as_bytes());
        }
        let full = format!("\"{}\"", "x".repeat(MOST_BYTES - 2));
        assert_eq!(Workspace::read(&full, None).unwrap().bytes().len(), MOST_BYTES);
        let table = [
            ("", "(0 bytes) must be JSON, or the absolute path of a file: EOF while parsing"),
            ("hunter2", "(7 bytes) must be JSON, or the absolute path of a file: expected value at line 1 column 1"),
            (r#"{"password": hunter2}"#, "(21 bytes) must be JSON"),
            (r#"{"password": "hunter2"} hunter2"#, "(31 bytes) must be JSON"),
            ("hunter2.json", "(12 bytes) must be JSON"),
            (&format!("{full} "), "(262145 bytes) larger than 262144 bytes"),
            (&"[".repeat(100_000), "EOF while parsing a list at line 1 column 100000"),
        ];
        for (value, expected) in table {
            let text = refused(value, None);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn a_file_is_read_only_from_beneath_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("allowed");
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(outer.path().join("secret"), SECRET).unwrap();
        fs::write(folder.join("sub/file"), SECRET).unwrap();
        fs::write(folder.join("full"), vec![7; MOST_BYTES]).unwrap();
        fs::write(folder.join("large"), vec![7; MOST_BYTES + 1]).unwrap();
        nix::unistd::mkfifo(&folder.join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("sub/file", folder.join("inside")).unwrap();
        symlink("../secret", folder.join("up")).unwrap();
        symlink(outer.path().join("secret"), folder.join("absolute")).unwrap();
        symlink(outer.path(), folder.join("way")).unwrap();
        let at = |name: &str| format!("{}/{name}", folder.display());

        for name in ["sub/file", "inside", "sub/../sub/file", "./sub//file"] {
            assert_eq!(Workspace::read(&at(name), Some(&folder)).unwrap().bytes(), SECRET.as_bytes(), "{name}");
        }
        assert_eq!(Workspace::read(&at("full"), Some(&folder)).unwrap().bytes().len(), MOST_BYTES);
        let outside = format!("not a file under workspace_dir, {}", folder.display());
        let table = [
            (at("../secret"), outside.as_str()),
            (at("up"), &outside),
            (at("absolute"), &outside),
            (at("way/secret"), &outside),
            (at(""), &outside),
            (format!("{}x/file", folder.display()), &outside),
            ("/etc/shadow".to_owned(), &outside),
            (at("none"), "open it: No such file"),
            (at("sub"), "not a plain file"),
            (at("fifo"), "not a plain file"),
            (at("large"), "larger than 262144 bytes"),
        ];
        for (path, expected) in &table {
            let text = refused(path, Some(&folder));
            assert!(text.starts_with(&format!("{path:?} ")) && text.contains(expected), "{text}");
        }
        assert!(refused(&at("sub/file"), None).ends_with("workspace_dir is not in husk's configuration"));
        let gone = refused("/no/such/folder/x", Some(Path::new("/no/such/folder")));
        assert!(gone.contains("open workspace_dir, /no/such/folder: No such file"), "{gone}");
    }

    #[test]
    fn a_long_path_is_not_shown_whole_and_a_debug_print_shows_nothing() {
        assert_eq!(shown(&format!("/{}", "x".repeat(1000))), format!("\"/{}\"…", "x".repeat(SHOWN - 1)));
        let workspace = Workspace::read("\"hunter2\"", None).unwrap();
        assert_eq!(format!("{workspace:?}"), "Workspace(9 bytes)");
    }
}
