//! Relays byte streams, TCP connections and Unix sockets, between host and guest over vsock connections.
//!
//! A vsock connection carries one stream. Its first bytes name the destination: [`write_target`] from the host; from the
//! guest a socket's number (32 bits, big-endian), or the [`Transport`] of a DNS query. The other side connects and
//! replies with one byte: [`CONNECTED`], or the errno(3) of the failure. Then both sides send frames: a 16-bit
//! big-endian length, and as many bytes. An empty frame ends one direction. A vsock connection that closes without it
//! was reset, so a half-close, a close and a reset stay different things, and no stream depends on the half-close of
//! vsock connections.
//!
//! With [`Transport::Udp`] there is no reply; what follows is in [`crate::datagram`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// The reply of a side that has connected to the destination.
pub const CONNECTED: u8 = 0;
/// Most bytes of a frame that this side sends, and size of the two buffers of a relayed stream, bytes. Below the 26 KiB
/// from which the guest's allocator maps each block: see [`crate::STDIO_CHUNK`].
pub const CHUNK: usize = 16 * 1024;
/// How long a stream may be silent after one of its directions has ended. A peer that is gone and one that only listens
/// look the same.
const HALF_CLOSED: Duration = Duration::from_secs(600);
/// Pause after a failed accept, which means a lack of descriptors or memory. Without it the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Length of a frame's header, bytes.
const HEADER: usize = 2;
/// EIO: the reply for failures without an errno(3) that fits into a byte.
const OTHER_FAILURE: u8 = 5;

/// What a destination is reached by: the protocol's number (IPPROTO_TCP, IPPROTO_UDP), one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Transport {
    /// A stream.
    Tcp = 6,
    /// One datagram in each direction.
    Udp = 17,
}

impl Transport {
    /// Receives it.
    ///
    /// # Errors
    /// When the connection fails, or for another protocol.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        match from.read_u8().await? {
            6 => Ok(Self::Tcp),
            17 => Ok(Self::Udp),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("transport protocol {other}"))),
        }
    }
}

/// Why a stream ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The relay on the other side closed the vsock connection.
    #[error("the other side has reset the stream")]
    Peer(#[source] io::Error),
    /// The local socket cannot be read.
    #[error("read the local socket")]
    Read(#[source] io::Error),
    /// The local socket accepts no more bytes.
    #[error("write to the local socket")]
    Write(#[source] io::Error),
    /// One direction has ended, and the other one has been silent since.
    #[error("one direction has ended, and the other one was silent for {} s", HALF_CLOSED.as_secs())]
    HalfClosed,
}

/// Sends the address that the guest connects to.
///
/// # Errors
/// When the connection fails.
pub async fn write_target(
    to: &mut (impl AsyncWrite + Unpin),
    transport: Transport,
    target: SocketAddr,
) -> io::Result<()> {
    let (family, address) = match target.ip() {
        IpAddr::V4(address) => (4, address.to_ipv6_mapped()),
        IpAddr::V6(address) => (6, address),
    };
    let mut bytes = vec![transport as u8, family];
    bytes.extend(address.octets());
    bytes.extend(target.port().to_be_bytes());
    to.write_all(&bytes).await
}

/// Receives the address that the guest connects to.
///
/// # Errors
/// When the connection fails, or for an address of another family or another protocol.
pub async fn read_target(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(Transport, SocketAddr)> {
    let transport = Transport::read(from).await?;
    let family = from.read_u8().await?;
    let mut address = [0; 16];
    from.read_exact(&mut address).await?;
    let port = from.read_u16().await?;
    let [.., a, b, c, d] = address;
    let ip: IpAddr = match family {
        4 => Ipv4Addr::new(a, b, c, d).into(),
        6 => Ipv6Addr::from(address).into(),
        other => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("address family {other}"))),
    };
    Ok((transport, (ip, port).into()))
}

/// The reply to an attempt to connect to the destination.
pub fn status<T>(connected: &io::Result<T>) -> u8 {
    let Err(error) = connected else { return CONNECTED };
    error.raw_os_error().and_then(|errno| u8::try_from(errno).ok()).filter(|&errno| errno != 0).unwrap_or(OTHER_FAILURE)
}

/// Receives the reply of the other side.
///
/// # Errors
/// When the other side could not connect: its error; or when the connection fails.
pub async fn read_status(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    match from.read_u8().await? {
        CONNECTED => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno.into())),
    }
}

/// A socket that accepts connections.
pub trait Listener: Send {
    /// A connection.
    type Client: Send + 'static;

    /// Waits for the next connection.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Client>> + Send;
}

impl Listener for TcpListener {
    type Client = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        TcpListener::accept(self).await.map(|(client, _)| client)
    }
}

impl Listener for UnixListener {
    type Client = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        UnixListener::accept(self).await.map(|(client, _)| client)
    }
}

/// A boxed task. The guest's small init has one copy of what runs tasks, and not one for each kind of task.
pub type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What [`serve_all`] serves.
pub trait Source: Send {
    /// Waits for the next client, and returns what serves it.
    fn next(&mut self) -> Pin<Box<dyn Future<Output = io::Result<Work>> + Send + '_>>;
}

/// Serves the connections of a listener.
struct Accepting<L, F> {
    listener: L,
    serve: F,
}

impl<L: Listener + Sync, S: Future<Output = ()> + Send + 'static, F: Fn(L::Client) -> S + Send + Sync> Source
    for Accepting<L, F>
{
    fn next(&mut self) -> Pin<Box<dyn Future<Output = io::Result<Work>> + Send + '_>> {
        Box::pin(async {
            let client = self.listener.accept().await?;
            Ok(Box::pin((self.serve)(client)) as Work)
        })
    }
}

/// Serves each connection of a listener in a task of its own, as many at a time as `slots` has permits. Reports accepts
/// that failed to `failed`. Does not return; dropping it ends the connections.
pub fn serve<L: Listener + Sync + 'static, S: Future<Output = ()> + Send + 'static>(
    listener: L,
    slots: Arc<Semaphore>,
    failed: fn(io::Error),
    serve: impl Fn(L::Client) -> S + Send + Sync + 'static,
) -> Work {
    Box::pin(serve_all(Box::new(Accepting { listener, serve }), slots, failed))
}

/// Serves each client of a source in a task of its own, as many at a time as `slots` has permits. Does not return.
pub(crate) async fn serve_all(mut source: Box<dyn Source>, slots: Arc<Semaphore>, failed: fn(io::Error)) {
    let mut clients = JoinSet::new();
    loop {
        let served = tokio::select! {
            next = source.next() => match next {
                Ok(served) => served,
                Err(error) => {
                    failed(error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_) = clients.join_next() => continue,
        };
        // After the accept: an idle socket must not occupy a slot. The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let served: Work = Box::pin(async move {
            served.await;
            drop(slot);
        });
        clients.spawn(served);
    }
}

/// A connection. Not a type parameter of [`relay`], of which the guest's small init would have one copy for each type.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Copies in both directions between a local connection and the vsock connection `peer` until both have ended. After an
/// error, `local` is to be reset: its peer must not take a truncated stream for a complete one.
///
/// # Errors
/// When the stream ends before its end on either side.
pub async fn relay(local: &mut dyn Duplex, peer: &mut dyn Duplex) -> Result<(), RelayError> {
    let (mut local_read, mut local_write) = tokio::io::split(local);
    let (mut peer_read, mut peer_write) = tokio::io::split(peer);
    let moved = AtomicU64::new(0);
    let mut sending = pin!(send(&mut local_read, &mut peer_write, &moved));
    let mut receiving = pin!(receive(&mut peer_read, &mut local_write, &moved));
    tokio::select! {
        sent = &mut sending => {
            sent?;
            unless_silent(receiving.as_mut(), &moved).await
        }
        received = &mut receiving => match received {
            // Whoever stops reading may still have something to say, such as the reason.
            Err(error @ RelayError::Write(_)) => {
                unless_silent(sending.as_mut(), &moved).await?;
                Err(error)
            }
            Err(error) => Err(error),
            Ok(()) => unless_silent(sending.as_mut(), &moved).await,
        },
    }
}

/// Waits for the remaining direction while it moves bytes.
async fn unless_silent(
    mut rest: Pin<&mut (dyn Future<Output = Result<(), RelayError>> + Send)>,
    moved: &AtomicU64,
) -> Result<(), RelayError> {
    loop {
        let before = moved.load(Ordering::Relaxed);
        match tokio::time::timeout(HALF_CLOSED, rest.as_mut()).await {
            Ok(ended) => return ended,
            Err(_) if moved.load(Ordering::Relaxed) == before => return Err(RelayError::HalfClosed),
            Err(_) => {}
        }
    }
}

async fn send(
    local: &mut (impl AsyncRead + Unpin),
    peer: &mut (impl AsyncWrite + Unpin),
    moved: &AtomicU64,
) -> Result<(), RelayError> {
    let mut frame = vec![0; HEADER + CHUNK];
    loop {
        let length = local.read(&mut frame[HEADER..]).await.map_err(RelayError::Read)?;
        frame[..HEADER].copy_from_slice(&(length as u16).to_be_bytes());
        peer.write_all(&frame[..HEADER + length]).await.map_err(RelayError::Peer)?;
        moved.fetch_add(length as u64, Ordering::Relaxed);
        if length == 0 {
            return Ok(());
        }
    }
}

async fn receive(
    peer: &mut (impl AsyncRead + Unpin),
    local: &mut (impl AsyncWrite + Unpin),
    moved: &AtomicU64,
) -> Result<(), RelayError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut left = usize::from(peer.read_u16().await.map_err(RelayError::Peer)?);
        if left == 0 {
            return local.shutdown().await.map_err(RelayError::Write);
        }
        while left > 0 {
            let room = left.min(CHUNK);
            let length = peer.read(&mut buffer[..room]).await.map_err(RelayError::Peer)?;
            if length == 0 {
                return Err(RelayError::Peer(io::ErrorKind::UnexpectedEof.into()));
            }
            local.write_all(&buffer[..length]).await.map_err(RelayError::Write)?;
            moved.fetch_add(length as u64, Ordering::Relaxed);
            left -= length;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::task::JoinHandle;

    use super::*;

    type Relayed = JoinHandle<Result<(), RelayError>>;

    /// A relay on each side of a connection, and the two programs that they connect.
    fn relayed() -> (DuplexStream, DuplexStream, [Relayed; 2]) {
        let (host, guest) = duplex(64);
        let [(client, relay_of_client), (server, relay_of_server)] = [duplex(64), duplex(64)];
        let run = |mut local: DuplexStream, mut peer: DuplexStream| {
            tokio::spawn(async move { relay(&mut local, &mut peer).await })
        };
        (client, server, [run(relay_of_client, host), run(relay_of_server, guest)])
    }

    #[tokio::test]
    async fn each_direction_ends_on_its_own_and_nothing_is_lost() {
        let (mut client, mut server, relays) = relayed();
        let request: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        let sent = request.clone();
        let client = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut response = Vec::new();
            client.read_to_end(&mut response).await.unwrap();
            response
        });
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, request);
        // The client has ended its direction; the other one still works.
        server.write_all(&received).await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(client.await.unwrap(), request);
        for relay in relays {
            relay.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_connection_that_closes_without_an_end_is_an_error() {
        for bytes in [&b""[..], b"\0", b"\0\x05abc"] {
            let (mut host, mut guest) = duplex(64);
            let (mut client, mut local) = duplex(64);
            host.write_all(bytes).await.unwrap();
            drop(host);
            assert!(matches!(relay(&mut local, &mut guest).await, Err(RelayError::Peer(_))), "{bytes:?}");
            drop(local);
            let mut received = Vec::new();
            client.read_to_end(&mut received).await.unwrap();
            assert_eq!(received, bytes.get(2..).unwrap_or_default());
        }
    }

    #[tokio::test]
    async fn the_last_words_of_a_program_that_stops_reading_arrive() {
        let (mut client, mut server, relays) = relayed();
        server.write_all(b"no").await.unwrap();
        drop(server);
        // The relay notices when it writes.
        client.write_all(&[0; 32]).await.unwrap();
        let mut received = [0; 2];
        client.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"no");
        drop(client);
        for relay in relays {
            let _ended_either_way = relay.await.unwrap();
        }
    }

    #[tokio::test]
    async fn targets_and_replies_read_back_unchanged() {
        for target in ["127.0.0.1:80", "10.0.0.7:65535", "[::1]:1", "[fd00::7]:443"] {
            let target: SocketAddr = target.parse().unwrap();
            for transport in [Transport::Tcp, Transport::Udp] {
                let mut wire = Vec::new();
                write_target(&mut wire, transport, target).await.unwrap();
                assert_eq!(read_target(&mut wire.as_slice()).await.unwrap(), (transport, target));
            }
        }
        for (transport, family) in [(1, 4), (6, 9)] {
            let wire = [&[transport, family][..], &[0; 18]].concat();
            assert_eq!(read_target(&mut wire.as_slice()).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let refused = io::Error::from_raw_os_error(111);
        assert_eq!(status(&Ok(())), CONNECTED);
        assert_eq!(status::<()>(&Err(io::ErrorKind::InvalidData.into())), OTHER_FAILURE);
        let reply = [status::<()>(&Err(refused))];
        assert_eq!(read_status(&mut reply.as_slice()).await.unwrap_err().raw_os_error(), Some(111));
    }
}
