//! Which Unix sockets of the host a container may mount.

use std::fs;
use std::path::Path;

use crate::config::settings::AllowedSocket;
use crate::host::unix::{Access, SocketFile};

/// Checks a socket that a spec mounts, and returns its owner and permissions. `path` must contain no symbolic link.
///
/// # Errors
/// The reason why the socket cannot be mounted.
pub(crate) fn check(allowed: &[AllowedSocket], path: &Path) -> Result<Access, String> {
    if !allowed.iter().any(|one| allows(one, path)) {
        return Err(format!(
            "is the socket {} of the host, which the configuration does not allow: add it to the key sockets, or use \
             another runtime",
            path.display()
        ));
    }
    let file = SocketFile::open(path).map_err(|error| format!("on the host: {error}"))?;
    match file.other_kind() {
        Ok(None) => file.access().map_err(|error| format!("on the host: {error}")),
        Ok(Some(kind)) => Err(format!("is a socket for {kind}, but only stream sockets work in a VM")),
        Err(error) => Err(format!("find out the socket's type: {error}")),
    }
}

/// An entry may itself lead through symbolic links, such as /var/run. One that does not exist allows nothing.
fn allows(allowed: &AllowedSocket, path: &Path) -> bool {
    match allowed {
        AllowedSocket::File(file) => fs::canonicalize(file).is_ok_and(|file| file == path),
        AllowedSocket::Below(folder) => fs::canonicalize(folder).is_ok_and(|folder| path.starts_with(folder)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn only_allowed_stream_sockets_can_be_mounted() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["plugins", "plugins-other"] {
            fs::create_dir(at(name)).unwrap();
        }
        let names = ["a", "plugins/b", "plugins-other/c"];
        let _listeners = names.map(|name| UnixListener::bind(at(name)).unwrap());
        let _datagrams = UnixDatagram::bind(at("d")).unwrap();
        symlink(at("a"), at("link")).unwrap();
        let allowed = [
            AllowedSocket::File(at("link")),
            AllowedSocket::Below(at("plugins")),
            AllowedSocket::File(at("d")),
            AllowedSocket::File(at("missing")),
        ];
        let table = [
            ("a", ""),
            ("plugins/b", ""),
            ("plugins-other/c", "plugins-other/c of the host, which the configuration does not allow"),
            ("d", "is a socket for datagrams, but only stream sockets work in a VM"),
        ];
        for (name, expected) in table {
            let error = check(&allowed, &at(name)).err().unwrap_or_default();
            assert!(error.contains(expected) && error.is_empty() == expected.is_empty(), "{name}: {error}");
        }
        assert!(check(&[], &at("a")).is_err());
    }
}
