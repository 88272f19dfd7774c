//! virtiofsd, which serves the share to the guest: finding it, its arguments, starting it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::host::child::{Child, Launch, LaunchError};

/// The number at which virtiofsd inherits its listening socket.
const LISTENER: i32 = crate::host::child::FIRST_FD;
/// Where distributions put it, outside of PATH. /usr/lib/qemu/virtiofsd is not among them: that is the old one in C, with other options.
const PLACES: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/libexec/qemu/virtiofsd"];

/// Why virtiofsd does not run.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsdError {
    /// It is nowhere.
    #[error(
        "no virtiofsd found; looked for {}: install it (Debian 13: apt-get install virtiofsd; elsewhere: cargo install virtiofsd), or set `virtiofsd` in husk's configuration",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// Everywhere it was looked for.
        looked: Vec<PathBuf>,
    },
    /// Its socket could not be made.
    #[error("{what} for virtiofsd: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It could not be started.
    #[error("{}: {source}", program.display())]
    Launch {
        /// Its path.
        program: PathBuf,
        /// Why not.
        source: LaunchError,
    },
}

/// Finds the program: where the configuration says, else beside the shim, in PATH, and where distributions put it.
///
/// # Errors
///
/// [`VirtiofsdError::NotFound`], with all the places.
pub fn find(
    configured: Option<&Path>,
    beside: Option<&Path>,
    path: Option<OsString>,
) -> Result<PathBuf, VirtiofsdError> {
    let candidates: Vec<PathBuf> = match configured {
        Some(configured) => vec![configured.to_owned()],
        None => {
            let in_path = path.iter().flat_map(std::env::split_paths).map(|folder| folder.join("virtiofsd"));
            let beside = beside.map(|folder| folder.join("virtiofsd"));
            beside.into_iter().chain(in_path).chain(PLACES.iter().map(PathBuf::from)).collect()
        }
    };
    let found = candidates.iter().find(|candidate| candidate.is_file()).cloned();
    found.ok_or(VirtiofsdError::NotFound { looked: candidates })
}

fn arguments(share: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![format!("--fd={LISTENER}").into(), "--shared-dir".into(), share.into()];
    // Its own mount namespace is a slave of the host's, so that what is mounted into the share later is seen; a submount has a
    // device number of its own in the guest, so that inode numbers of different containers are not mixed up.
    args.extend(["--sandbox=namespace", "--announce-submounts"].map(OsString::from));
    // Extended attributes carry file capabilities of images (ping's, for one).
    args.extend(["--xattr", "--cache=auto", "--log-level=warn"].map(OsString::from));
    // File handles would take the capability to open any file of the host by number.
    args.push("--inode-file-handles=never".into());
    args
}

/// What virtiofsd will listen on, and the connected socket for the machine, which may use it before virtiofsd runs: the connection waits
/// in the listener's queue.
///
/// `private` is a folder that only root may enter; the socket has a name in it for a moment.
///
/// # Errors
///
/// When the socket cannot be made.
pub fn socket(private: &Path) -> Result<(UnixListener, OwnedFd), VirtiofsdError> {
    let socket = |what| move |source| VirtiofsdError::Socket { what, source };
    let folder = File::open(private).map_err(socket("open the state folder"))?;
    // By descriptor: the whole path may be longer than a socket's name can be (107 bytes, unix(7)).
    let path = PathBuf::from(format!("/proc/self/fd/{}/virtiofsd.sock", folder.as_raw_fd()));
    let listener = UnixListener::bind(&path).map_err(socket("bind a socket"))?;
    let connected = UnixStream::connect(&path).map_err(socket("connect the socket"));
    std::fs::remove_file(&path).map_err(socket("remove the socket's name"))?;
    Ok((listener, connected?.into()))
}

/// Starts virtiofsd on the folder `share`, listening on what [`socket`] made.
///
/// # Errors
///
/// When the program cannot be started; then nothing is left.
pub fn start(
    program: &Path,
    share: &Path,
    listener: UnixListener,
    log: File,
    cgroups: Vec<File>,
) -> Result<Child, VirtiofsdError> {
    let launch = Launch {
        program: program.to_owned(),
        args: arguments(share),
        env: Vec::new(),
        fds: vec![(listener.into(), LISTENER)],
        // It sets up namespaces and serves files of every owner; its sandbox takes the rest away.
        user: None,
        output: log,
        cgroups,
        leads: false,
    };
    launch.spawn().map_err(|source| VirtiofsdError::Launch { program: program.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_in_order_and_what_is_configured_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("virtiofsd"), "").unwrap();
            folder
        };
        let (beside, in_path) = (place("beside"), place("bin"));
        let path = || Some(in_path.clone().into_os_string());
        assert_eq!(find(None, Some(&beside), path()).unwrap(), beside.join("virtiofsd"));
        assert_eq!(find(None, Some(&dir.path().join("other")), path()).unwrap(), in_path.join("virtiofsd"));
        let error = find(Some(Path::new("/nowhere/virtiofsd")), Some(&beside), path()).unwrap_err().to_string();
        assert!(error.starts_with("no virtiofsd found; looked for /nowhere/virtiofsd: install it"), "{error}");
    }

    #[test]
    fn the_share_is_sandboxed_and_mounts_are_announced() {
        let args = arguments(Path::new("/run/husk/a/b/share"));
        for wanted in ["--fd=900", "--shared-dir", "/run/husk/a/b/share", "--sandbox=namespace", "--announce-submounts"]
        {
            assert!(args.iter().any(|arg| arg == wanted), "{wanted} in {args:?}");
        }
    }
}
