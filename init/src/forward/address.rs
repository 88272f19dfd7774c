//! TCP connections from the host to an address of the VM, which is usually a loopback address; and DNS queries from the
//! host to servers that the VM can reach.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket as StdSocket};
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::datagram;
use husk_protos::relay::{Transport, read_target, relay, status};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_vsock::VsockStream;

/// Time for the host to name the address and for the server to accept. The host waits longer.
const CONNECT: Duration = Duration::from_secs(10);

/// Time for an answer to a query. docker's DNS server waits no longer than four seconds.
const ANSWER: Duration = Duration::from_secs(15);

/// Relays one connection or query from the host.
pub(crate) async fn forward(mut host: VsockStream) {
    let mut server = match timeout(CONNECT, connect(&mut host)).await {
        Ok(Ok(Server::Stream(server))) => server,
        Ok(Ok(Server::Datagram(server))) => return answer(host, &server).await,
        // The host has the error.
        Ok(Err(error)) => return tracing::debug!(error = %Chain(&error), "failed to forward a connection"),
        Err(_) => return tracing::debug!("a forwarded connection was not accepted in time"),
    };
    if let Err(error) = relay(&mut server, &mut host).await {
        tracing::debug!(error = %Chain(&error), "a forwarded connection ended early");
        reset_on_drop(&server);
    }
}

/// What the host has named.
enum Server {
    Stream(TcpStream),
    Datagram(UdpSocket),
}

async fn connect(host: &mut VsockStream) -> io::Result<Server> {
    let (transport, target) = read_target(host).await?;
    if transport == Transport::Udp {
        let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let server = StdSocket::bind((any, 0))?;
        server.connect(target)?;
        server.set_nonblocking(true)?;
        return Ok(Server::Datagram(UdpSocket::from_std(server)?));
    }
    let connected = TcpStream::connect(target).await;
    host.write_u8(status(&connected)).await?;
    let server = connected?;
    // The relay forwards bytes as they come. Small writes must not wait for acknowledgements.
    server.set_nodelay(true)?;
    Ok(Server::Stream(server))
}

/// Relays a query and its answer.
async fn answer(mut host: VsockStream, server: &UdpSocket) {
    let answered = timeout(ANSWER, datagram::answer(&mut host, server)).await;
    if let Err(error) = answered.unwrap_or_else(|late| Err(late.into())) {
        tracing::debug!(%error, "a forwarded query got no answer");
    }
}

/// Makes the server see that the stream is not complete.
fn reset_on_drop(server: &TcpStream) {
    if let Err(error) = server.set_zero_linger() {
        tracing::warn!(%error, "failed to make the close of a connection a reset");
    }
}
