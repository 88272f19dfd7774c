//! Unix sockets in a sandbox's folder. By a descriptor of the folder, because its path may be longer than a socket's name can be
//! (107 bytes, unix(7)).

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

/// How long the system may need to have descriptors again after it had none for a client.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

fn by_descriptor(folder: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

/// Listens on `name` in `folder`, with mode 0600. The folder must be one that only its owner may enter: for a moment the mode is another.
///
/// # Errors
/// When the name is taken, or what the system says.
pub fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
    let folder = File::open(folder)?;
    let path = by_descriptor(&folder, name);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Attends to whoever connects, each in a task of its own, `clients` of them at a time: those beyond are given to `turn_away`, and hung up on.
/// Until the returned task is aborted or the runtime ends; `name` is for the log.
pub fn serve<F>(
    listener: Listener,
    name: &'static str,
    clients: usize,
    turn_away: impl Fn(&Stream) + Send + 'static,
    attend: impl Fn(Stream) -> F + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(clients));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "no client of {name} can be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                turn_away(&stream);
                continue;
            };
            let attended = attend(stream);
            tokio::spawn(async move {
                attended.await;
                drop(place);
            });
        }
    })
}

/// Connects to the socket `name` in `folder`.
///
/// # Errors
/// `NotFound` when there is none, `ConnectionRefused` when nobody listens; or what the system says.
pub fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let folder = File::open(folder)?;
    UnixStream::connect(by_descriptor(&folder, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_private_and_its_folders_path_may_be_long() {
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
