//! The workspace configuration of a sandbox: the value of its annotation, or a file of the host that the annotation
//! names. It may contain secrets, so neither errors nor debug output show any of it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use serde::de::IgnoredAny;

/// Size limit, bytes.
pub(crate) const MAX_BYTES: usize = 256 * 1024;
/// An error shows at most this much of a file's path, characters.
const SHOWN: usize = 200;

/// A complete workspace configuration.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Workspace(Arc<[u8]>);

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workspace({} bytes)", self.0.len())
    }
}

impl Workspace {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads an annotation's value: JSON, or the absolute path of a file under `<folder>/<namespace>`: whoever uses one
    /// namespace of containerd cannot read the files of others. No JSON begins with a slash.
    ///
    /// # Errors
    ///
    /// The problem and what is allowed, without any of the content.
    pub(crate) fn read(value: &str, folder: Option<&Path>, namespace: &str) -> Result<Self, String> {
        if value.starts_with('/') {
            return read_file(Path::new(value), folder, namespace).map(|bytes| Self(bytes.into()));
        }
        if value.len() > MAX_BYTES {
            return Err(too_large());
        }
        // serde_json's error contains the position and what it expected there, but no content.
        let checked = serde_json::from_str::<IgnoredAny>(value);
        checked.map_err(|error| format!("must be JSON, or the absolute path of a file: {error}"))?;
        Ok(Self(value.as_bytes().into()))
    }

    /// Reads a file that a shim has written; none if it does not exist.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or is larger than any workspace.
    pub(crate) fn read_back(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => {
                bounded(file)?.map(|bytes| Some(Self(bytes.into()))).ok_or_else(|| io::Error::other(too_large()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The part of an annotation's value that an error may show.
pub(crate) fn shown(value: &str) -> String {
    if !value.starts_with('/') {
        return format!("({} bytes)", value.len());
    }
    let beginning: String = value.chars().take(SHOWN).collect();
    let more = if beginning.len() < value.len() { "…" } else { "" };
    format!("{beginning:?}{more}")
}

fn too_large() -> String {
    format!("larger than {MAX_BYTES} bytes")
}

fn read_file(path: &Path, folder: Option<&Path>, namespace: &str) -> Result<Vec<u8>, String> {
    let Some(all) = folder else {
        return Err("files are not allowed, because husk's configuration has no workspace_dir".to_owned());
    };
    let folder = all.join(namespace);
    let outside = || {
        // Before there were folders of namespaces, the files were in workspace_dir itself.
        let moved = if path.starts_with(all) { ". Move the files of this namespace there" } else { "" };
        format!("not a file under {}, the folder of this namespace in workspace_dir{moved}", folder.display())
    };
    let name = path.strip_prefix(&folder).ok().filter(|name| !name.as_os_str().is_empty()).ok_or_else(outside)?;
    let base =
        open(&folder, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).map_err(|error| {
            let folder = folder.display();
            format!(
                "failed to open {folder}, the folder of this namespace in workspace_dir: {}",
                io::Error::from(error)
            )
        })?;
    // Resolved beneath the folder, regardless of the name and of links, even of links that are created meanwhile.
    // O_NONBLOCK: opening a fifo does not block.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(&base, name, how).map(File::from).map_err(|error| match error {
        nix::errno::Errno::EXDEV => outside(),
        error => format!("failed to open the file: {}", io::Error::from(error)),
    })?;
    let metadata = file.metadata().map_err(|error| format!("failed to stat the file: {error}"))?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    bounded(file).map_err(|error| format!("failed to read the file: {error}"))?.ok_or_else(too_large)
}

/// The content of a file, unless it is too large.
fn bounded(file: File) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= MAX_BYTES).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    const SECRET: &str = "hunter2";

    fn rejection(value: &str, folder: Option<&Path>) -> String {
        let why = Workspace::read(value, folder, "ns").unwrap_err();
        let text = format!("{} {why}", shown(value));
        assert!(!text.contains(SECRET), "{text}");
        text
    }

    #[test]
    fn json_is_accepted_unchanged_and_everything_else_is_rejected() {
        for good in ["{}", r#"{ "password":"hunter2" }"#, "[1, 2]", "\"x\"", " 7 "] {
            assert_eq!(Workspace::read(good, None, "ns").unwrap().bytes(), good.as_bytes());
        }
        let full = format!("\"{}\"", "x".repeat(MAX_BYTES - 2));
        assert_eq!(Workspace::read(&full, None, "ns").unwrap().bytes().len(), MAX_BYTES);
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
            let text = rejection(value, None);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn a_file_is_read_only_from_beneath_the_folder() {
        let outer = tempfile::tempdir().unwrap();
        let all = outer.path().join("allowed");
        let folder = all.join("ns");
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::create_dir(all.join("other")).unwrap();
        fs::write(all.join("other/file"), SECRET).unwrap();
        fs::write(all.join("file"), SECRET).unwrap();
        fs::write(all.join("secret"), SECRET).unwrap();
        fs::write(folder.join("sub/file"), SECRET).unwrap();
        fs::write(folder.join("full"), vec![7; MAX_BYTES]).unwrap();
        fs::write(folder.join("large"), vec![7; MAX_BYTES + 1]).unwrap();
        nix::unistd::mkfifo(&folder.join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("sub/file", folder.join("inside")).unwrap();
        symlink("../secret", folder.join("up")).unwrap();
        symlink(all.join("secret"), folder.join("absolute")).unwrap();
        symlink(&all, folder.join("way")).unwrap();
        let at = |name: &str| format!("{}/{name}", folder.display());

        for name in ["sub/file", "inside", "sub/../sub/file", "./sub//file"] {
            assert_eq!(Workspace::read(&at(name), Some(&all), "ns").unwrap().bytes(), SECRET.as_bytes(), "{name}");
        }
        assert_eq!(Workspace::read(&at("full"), Some(&all), "ns").unwrap().bytes().len(), MAX_BYTES);
        let outside = format!("not a file under {}, the folder of this namespace in workspace_dir", folder.display());
        let moved = format!("{outside}. Move the files of this namespace there");
        let table = [
            (at("../secret"), outside.as_str()),
            (at("up"), &outside),
            (at("absolute"), &outside),
            (at("way/secret"), &outside),
            (at(""), &outside),
            (format!("{}x/file", folder.display()), &outside),
            (at("../other/file"), &outside),
            (format!("{}/other/file", all.display()), &moved),
            (format!("{}/file", all.display()), &moved),
            ("/etc/shadow".to_owned(), &outside),
            (at("none"), "failed to open the file: No such file"),
            (at("sub"), "not a regular file"),
            (at("fifo"), "not a regular file"),
            (at("large"), "larger than 262144 bytes"),
        ];
        for (path, expected) in &table {
            let text = rejection(path, Some(&all));
            assert!(text.starts_with(&format!("{path:?} ")) && text.contains(expected), "{text}");
        }
        assert!(rejection(&at("sub/file"), None).ends_with("husk's configuration has no workspace_dir"));
        let gone = rejection("/no/such/folder/x", Some(Path::new("/no/such/folder")));
        assert!(gone.contains("not a file under /no/such/folder/ns"), "{gone}");
        let gone = rejection("/no/such/folder/ns/x", Some(Path::new("/no/such/folder")));
        let expected = "failed to open /no/such/folder/ns, the folder of this namespace in workspace_dir: No such file";
        assert!(gone.contains(expected), "{gone}");
    }

    #[test]
    fn errors_truncate_a_long_path_and_debug_output_shows_only_the_size() {
        assert_eq!(shown(&format!("/{}", "x".repeat(1000))), format!("\"/{}\"…", "x".repeat(SHOWN - 1)));
        let workspace = Workspace::read("\"hunter2\"", None, "ns").unwrap();
        assert_eq!(format!("{workspace:?}"), "Workspace(9 bytes)");
    }
}
