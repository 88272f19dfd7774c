//! TCP connections from the host to an address of the VM, which is usually a loopback address.

use std::io;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::relay::{read_target, relay, status};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_vsock::VsockStream;

/// Time for the host to name the address and for the server to accept. The host waits longer.
const CONNECT: Duration = Duration::from_secs(10);

/// Relays one connection from the host.
pub(crate) async fn forward(mut host: VsockStream) {
    let mut server = match timeout(CONNECT, connect(&mut host)).await {
        Ok(Ok(server)) => server,
        // The host has the error.
        Ok(Err(error)) => return tracing::debug!(error = %Chain(&error), "failed to forward a connection"),
        Err(_) => return tracing::debug!("a forwarded connection was not accepted in time"),
    };
    if let Err(error) = relay(&mut server, &mut host).await {
        tracing::debug!(error = %Chain(&error), "a forwarded connection ended early");
        reset_on_drop(&server);
    }
}

async fn connect(host: &mut VsockStream) -> io::Result<TcpStream> {
    let target = read_target(host).await?;
    let connected = TcpStream::connect(target).await;
    host.write_u8(status(&connected)).await?;
    let server = connected?;
    // The relay forwards bytes as they come. Small writes must not wait for acknowledgements.
    server.set_nodelay(true)?;
    Ok(server)
}

/// Makes the server see that the stream is not complete.
fn reset_on_drop(server: &TcpStream) {
    if let Err(error) = server.set_zero_linger() {
        tracing::warn!(%error, "failed to make the close of a connection a reset");
    }
}
