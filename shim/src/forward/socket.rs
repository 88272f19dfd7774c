//! Connects containers to the Unix sockets of the host that they mount.
//!
//! The guest selects a socket by a number. It never names a path: the paths are those that the configuration allows and
//! that the specs of the sandbox's containers name.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_protos::bundle::RelayedSocket;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::relay::relay;
use husk_vsock::{Stream, VsockError};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::{CONNECTIONS_MAX, Running, reply, serve_guest};
use crate::guest::client::Guest;
use crate::host::unix::SocketFile;
use crate::rootfs::spec::SocketMount;

/// Time for the guest to name the socket.
const NUMBER: Duration = Duration::from_secs(10);
/// Time for the socket's program to have room for the connection. Shorter than the guest's own wait.
const CONNECT: Duration = Duration::from_secs(10);

/// A socket that a container mounts.
#[derive(Debug)]
struct Mounted {
    container: String,
    path: PathBuf,
    /// Dropped with the container, which ends its connections.
    mounted: watch::Sender<()>,
}

/// By number.
#[derive(Debug, Default)]
struct Table {
    last: u32,
    sockets: HashMap<u32, Mounted>,
}

/// The sockets of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    table: Arc<Mutex<Table>>,
    /// The host's vsock port, once a container has sockets.
    served: Mutex<Option<(u32, Running)>>,
}

impl Sockets {
    /// Makes the sockets of a container available to the guest. Returns what the guest needs to know, and the host's
    /// vsock port.
    ///
    /// # Errors
    /// The port is in use.
    pub(crate) fn add(
        &self,
        container: &str,
        mounts: &[SocketMount],
        guest: &Guest,
    ) -> Result<(Vec<RelayedSocket>, u32), VsockError> {
        if mounts.is_empty() {
            return Ok((Vec::new(), 0));
        }
        let port = self.serve(guest)?;
        let mut table = lock(&self.table);
        let add = |mount: &SocketMount| {
            table.last += 1;
            let number = table.last;
            let (container, path) = (container.to_owned(), mount.path.clone());
            table.sockets.insert(number, Mounted { container, path, mounted: watch::channel(()).0 });
            RelayedSocket {
                mount: mount.index as u32,
                number,
                mode: mount.access.mode,
                uid: mount.access.uid,
                gid: mount.access.gid,
                ..Default::default()
            }
        };
        Ok((mounts.iter().map(add).collect(), port))
    }

    /// Ends the connections of a container. Does nothing if it has no sockets.
    pub(crate) fn remove(&self, container: &str) {
        lock(&self.table).sockets.retain(|_, socket| socket.container != container);
    }

    /// Serves the guest's connections, and returns the port.
    fn serve(&self, guest: &Guest) -> Result<u32, VsockError> {
        let mut served = lock(&self.served);
        if let Some((port, _)) = &*served {
            return Ok(*port);
        }
        let listener = guest.listen_for_relays()?;
        let (port, table) = (listener.number(), self.table.clone());
        let serve = serve_guest(listener, CONNECTIONS_MAX, move |guest| forward(guest, table.clone()));
        *served = Some((port, Running(tokio::spawn(serve).abort_handle())));
        Ok(port)
    }
}

/// Relays one connection of the guest.
async fn forward(mut guest: Stream, table: Arc<Mutex<Table>>) {
    let number = match timeout(NUMBER, guest.read_u32()).await {
        Ok(Ok(number)) => number,
        Ok(Err(_)) | Err(_) => return tracing::debug!("the guest named no socket"),
    };
    let found = lock(&table).sockets.get(&number).map(|socket| (socket.path.clone(), socket.mounted.subscribe()));
    let connected = match &found {
        Some((path, _)) => connect(path.clone()).await,
        None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    };
    if let Err(error) = &connected {
        let path = found.as_ref().map(|(path, _)| path.display());
        tracing::debug!(number, path = path.map(tracing::field::display), %error, "failed to connect to a socket");
    }
    let replied = reply(&mut guest, &connected).await;
    if let Err(error) = &replied {
        tracing::debug!(number, %error, "the guest took no reply");
    }
    let Some((_, mut mounted)) = found else { return };
    let (Ok(mut server), Ok(())) = (connected, replied) else { return };
    tokio::select! {
        relayed = relay(&mut server, &mut guest) => {
            if let Err(error) = relayed {
                tracing::debug!(number, error = %Chain(&error), "a connection to a socket ended early");
            }
        }
        // No value is ever sent: the container is gone.
        _ = mounted.changed() => {}
    }
}

async fn connect(path: PathBuf) -> io::Result<UnixStream> {
    let connected =
        tokio::task::spawn_blocking(move || -> io::Result<StdStream> { SocketFile::open(&path)?.connect(CONNECT) });
    UnixStream::from_std(connected.await.map_err(io::Error::other)??)
}
