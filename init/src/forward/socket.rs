//! Unix sockets of the host that containers mount. Each has a socket of its own here, on which PID 1 listens.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use husk_protos::SOCKETS_PATH;
use husk_protos::bundle::RelayedSocket;
use husk_protos::lock::lock;
use husk_protos::relay::serve;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::{CONNECTIONS_MAX, Listeners, host};
use crate::paths;

/// The sockets of all containers.
#[derive(Debug)]
pub(crate) struct Sockets {
    folder: PathBuf,
    slots: Arc<Semaphore>,
    containers: Mutex<HashMap<String, Listeners>>,
}

impl Default for Sockets {
    fn default() -> Self {
        Self::new(SOCKETS_PATH.into())
    }
}

impl Sockets {
    fn new(folder: PathBuf) -> Self {
        Self { folder, slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)), containers: Mutex::default() }
    }

    /// Creates a container's sockets. `port` is the host's port that connects to the sockets of the host. The caller
    /// calls [`Sockets::remove`] after an error as well.
    ///
    /// # Errors
    /// A socket cannot be created.
    pub(crate) fn add(&self, container: &str, sockets: &[RelayedSocket], port: u32) -> io::Result<()> {
        if sockets.is_empty() {
            return Ok(());
        }
        let folder = self.folder.join(container);
        // Every user of a container must pass through the folders.
        DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
        let mut listeners = Listeners::default();
        for socket in sockets {
            let listener = listen(&folder.join(socket.mount.to_string()), socket)?;
            let number = socket.number;
            let failed = |error| tracing::error!(%error, "failed to accept a connection to a socket of the host");
            let served = serve(listener, self.slots.clone(), failed, move |client| async move {
                host::forward(Box::new(client), &number.to_be_bytes(), port).await;
            });
            listeners.0.push(tokio::spawn(served).abort_handle());
        }
        lock(&self.containers).insert(container.to_owned(), listeners);
        Ok(())
    }

    /// Removes a container's sockets and ends their connections. Does nothing if there are none.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub(crate) fn remove(&self, container: &str) -> io::Result<()> {
        lock(&self.containers).remove(container);
        paths::allow_missing(fs::remove_dir_all(self.folder.join(container)))
    }
}

fn listen(path: &Path, socket: &RelayedSocket) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    chown(path, Some(socket.uid), Some(socket.gid))?;
    fs::set_permissions(path, Permissions::from_mode(socket.mode & 0o7777))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    use tokio::net::UnixStream;
    use tokio::time::timeout;

    use super::*;

    /// As long as a connection may wait for the host.
    const CONNECT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_containers_sockets_have_the_hosts_mode_and_vanish_with_the_container() {
        let folder = tempfile::tempdir().unwrap();
        let sockets = Sockets::new(folder.path().join("sockets"));
        let socket = RelayedSocket { mount: 3, number: 1, mode: 0o620, ..Default::default() };
        sockets.add("c", &[socket], 9).unwrap();
        let path = folder.path().join("sockets/c/3");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o620);
        let client = UnixStream::connect(&path).await.unwrap();
        sockets.remove("c").unwrap();
        assert!(!path.exists());
        // The connection ends: at the latest when the refusal of the host's port is known.
        let mut end = [0];
        let read = timeout(CONNECT, async {
            client.readable().await?;
            client.try_read(&mut end)
        });
        assert!(!matches!(read.await.unwrap(), Ok(1)));
        sockets.remove("c").unwrap();
    }
}
