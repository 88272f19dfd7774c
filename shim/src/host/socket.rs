//! Unix sockets in a sandbox's directory, reached through a descriptor of the directory: its path may exceed the 107
//! bytes of a socket's address (unix(7)).

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener as Listener, UnixStream as Stream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Pause after a failed accept, usually for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn path_through_descriptor(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

/// Listens on `name` in `folder` with mode 0600. Only the owner may have access to the folder, because the socket has
/// another mode for a moment.
///
/// # Errors
/// `AddrInUse` if the name is taken; otherwise those of the system calls.
pub fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
    let folder = File::open(folder)?;
    let path = path_through_descriptor(&folder, name);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves every client with `attend` in a task of its own, at most `clients` at a time. Further clients are passed to
/// `reject` and disconnected. Runs until the returned task is aborted or the runtime ends. `name` is for the log.
pub fn serve<F>(
    listener: Listener,
    name: &'static str,
    clients: usize,
    reject: impl Fn(&Stream) + Send + 'static,
    attend: impl Fn(Stream) -> F + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(clients));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, socket = name, "failed to accept a client");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                reject(&stream);
                continue;
            };
            let served = attend(stream);
            tokio::spawn(async move {
                served.await;
                drop(slot);
            });
        }
    })
}

/// Connects to the socket `name` in `folder`.
///
/// # Errors
/// `NotFound` if there is no socket, `ConnectionRefused` if no process listens; otherwise those of the system calls.
pub fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let folder = File::open(folder)?;
    UnixStream::connect(path_through_descriptor(&folder, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_private_and_work_in_folders_with_long_paths() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a".repeat(76)).join("b".repeat(76));
        std::fs::create_dir_all(&folder).unwrap();
        let _listener = listen(&folder, "ctl.sock").unwrap();
        assert_eq!(std::fs::metadata(folder.join("ctl.sock")).unwrap().permissions().mode() & 0o7777, 0o600);
        connect(&folder, "ctl.sock").unwrap();
        assert_eq!(listen(&folder, "ctl.sock").unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(connect(&folder, "console.sock").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
