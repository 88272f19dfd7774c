//! virtiofsd, which serves the share to the guest: finds the program and starts it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;

use super::open_files::OpenFiles;
use crate::host::child::{Child, FIRST_FD, Launch, LaunchError};
use crate::host::jail::Jail;

/// The descriptor at which virtiofsd inherits its listening socket.
const LISTENER: i32 = FIRST_FD;
/// Where husk's package and distributions install it outside of PATH. /usr/lib/qemu/virtiofsd is left out: it is the old
/// implementation in C, with other options.
const PLACES: [&str; 4] =
    ["/usr/libexec/husk/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/libexec/qemu/virtiofsd"];

/// Which extended attributes the guest's root may set. `security.capability` is the host's. Those that would require
/// CAP_SYS_ADMIN of virtiofsd have a prefix on the host, where they have no meaning; overlayfs in the guest needs them.
/// The guest does not see those of the host. (Each rule is `:type:scope:name in the guest:name on the host:`.)
const ATTRIBUTES: [&str; 7] = [
    ":ok:all:security.capability:security.capability:",
    ":prefix:all:trusted.:user.virtiofs.:",
    ":prefix:all:security.:user.virtiofs.:",
    ":bad:server::trusted.:",
    ":bad:server::security.:",
    ":bad:client:user.virtiofs.::",
    ":ok:all:::",
];

/// Why virtiofsd does not start.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsdError {
    /// The program does not exist.
    #[error(
        "no virtiofsd found; looked for {}: install it (Debian 13: apt-get install virtiofsd; elsewhere: cargo install virtiofsd), \
         or set `virtiofsd` in husk's configuration",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// The searched paths.
        looked: Vec<PathBuf>,
    },
    /// The socket cannot be created.
    #[error("{what} for virtiofsd")]
    Socket {
        /// The attempted operation.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The process cannot be started.
    #[error("start {}", program.display())]
    Launch {
        /// The program.
        program: PathBuf,
        /// The failed step.
        source: LaunchError,
    },
}

/// Finds the program: the configured path, else next to the shim, in PATH, or where distributions install it.
///
/// # Errors
///
/// [`VirtiofsdError::NotFound`], with all searched paths.
pub(crate) fn find(
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

fn arguments(share: &Path, open_files: OpenFiles) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![format!("--fd={LISTENER}").into(), "--shared-dir".into(), share.into()];
    // virtiofsd's mount namespace is a slave of the host's, so later mounts in the share propagate to it. Each submount
    // gets its own device number in the guest, so inode numbers of different containers do not collide.
    args.extend(["--sandbox=namespace", "--announce-submounts"].map(OsString::from));
    // Implies extended attributes. They carry the file capabilities in images, such as ping's.
    args.extend(["--posix-acl", "--cache=auto", "--log-level=warn"].map(OsString::from));
    args.push(format!("--xattrmap={}", ATTRIBUTES.join(" ")).into());
    // File handles would require the capability to open any file of the host by its handle.
    args.push("--inode-file-handles=never".into());
    args.push(format!("--rlimit-nofile={}", open_files.limit).into());
    args
}

/// The listening socket for virtiofsd, and a connected one for the machine. The machine may use its socket before
/// virtiofsd runs: the connection waits in the listener's queue.
///
/// `private` is a folder that only root may enter. The socket has a name in it for a moment.
///
/// # Errors
///
/// When the socket cannot be created.
pub(super) fn socket(private: &Path) -> Result<(UnixListener, OwnedFd), VirtiofsdError> {
    let socket = |what| move |source| VirtiofsdError::Socket { what, source };
    let folder = File::open(private).map_err(socket("open the state folder"))?;
    // By descriptor: the whole path may exceed the length of a socket's name (107 bytes, unix(7)).
    let path = PathBuf::from(format!("/proc/self/fd/{}/virtiofsd.sock", folder.as_raw_fd()));
    let listener = UnixListener::bind(&path).map_err(socket("bind a socket"))?;
    let connected = UnixStream::connect(&path).map_err(socket("connect the socket"));
    std::fs::remove_file(&path).map_err(socket("remove the socket's name"))?;
    Ok((listener, connected?.into()))
}

/// Starts virtiofsd on the folder `share` with the listener of [`socket`].
///
/// # Errors
///
/// When the program cannot be started; then no process is left.
pub(super) fn start(
    program: &Path,
    share: &Path,
    open_files: OpenFiles,
    listener: UnixListener,
    log: File,
    cgroups: Vec<File>,
) -> Result<Child, VirtiofsdError> {
    let launch = Launch {
        program: program.to_owned(),
        args: arguments(share, open_files),
        env: Vec::new(),
        fds: vec![(listener.into(), LISTENER)],
        jail: Some(jail()),
        output: log,
        cgroups,
        // It serves from a child, which a kill has to reach as well.
        leads: true,
    };
    launch.spawn().map_err(|source| VirtiofsdError::Launch { program: program.to_owned(), source })
}

/// What its own sandbox leaves out. That one creates the mount, PID and network namespaces, makes the share the root, and
/// drops all capabilities but those that the owner of every file needs: root, because the files have every owner.
fn jail() -> Jail {
    let namespaces = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    Jail { namespaces, user: None, loader: None, filter: None, capabilities: None, read_only: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtiofsd_is_searched_in_order_and_a_configured_path_is_final() {
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
        let limit = OpenFiles { limit: 3000, configured: 5000 };
        let args = arguments(Path::new("/run/husk/a/b/share"), limit);
        for expected in [
            "--fd=900",
            "--shared-dir",
            "/run/husk/a/b/share",
            "--sandbox=namespace",
            "--announce-submounts",
            "--rlimit-nofile=3000",
        ] {
            assert!(args.iter().any(|arg| arg == expected), "{expected} in {args:?}");
        }
    }
}
