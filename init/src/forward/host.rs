//! Connections of containers to destinations on the host: a Unix socket or a DNS server.

use std::io;
use std::time::Duration;

use husk_protos::HOST_CID;
use husk_protos::chain::Chain;
use husk_protos::relay::{Duplex, read_status, relay};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

/// Time for the host to connect to the destination.
const CONNECT: Duration = Duration::from_secs(20);

/// Relays one connection. `destination` is its name on the host's vsock port `port`.
pub(super) async fn forward(mut client: Box<dyn Duplex>, destination: &[u8], port: u32) {
    let connected = timeout(CONNECT, async {
        let mut host = connect(destination, port).await?;
        read_status(&mut host).await?;
        io::Result::Ok(host)
    });
    let mut host = match connected.await {
        Ok(Ok(host)) => host,
        Ok(Err(error)) => return tracing::debug!(port, %error, "failed to connect to a destination on the host"),
        Err(_) => return tracing::debug!(port, "the host did not connect to its destination in time"),
    };
    if let Err(error) = relay(&mut *client, &mut host).await {
        tracing::debug!(port, error = %Chain(&error), "a connection to a destination on the host ended early");
    }
}

/// Connects to a port of the host, and names the destination.
pub(super) async fn connect(destination: &[u8], port: u32) -> io::Result<VsockStream> {
    let mut host = VsockStream::connect(VsockAddr::new(HOST_CID, port)).await?;
    host.write_all(destination).await?;
    Ok(host)
}
