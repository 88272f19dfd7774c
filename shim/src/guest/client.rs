//! TTRPC clients of the guest's services, over its vsock link. Each call has a deadline.
//!
//! The guest's replies are untrusted: they are bounded before they are kept, and never used as a path on the host.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use containerd_shim_protos::shim_async::TaskClient;
use husk_protos::datagram;
use husk_protos::debug_ttrpc::DebugClient;
use husk_protos::events::{Event, SubscribeRequest};
use husk_protos::metered::{Meter, Metered};
use husk_protos::relay::{Transport, read_status, write_target};
use husk_protos::stdio::{InputChunk, InputResponse, OutputChunk, StreamKind, StreamRequest};
use husk_protos::system::Hello;
use husk_protos::{
    PORT_EVENTS, PORT_RELAY, PORT_STDIO, PORT_STREAMS, PORT_TASK, PROTOCOL, RECEIVE_WINDOW, SECRET,
    bundle_ttrpc::BundleClient, disks_ttrpc::DisksClient, events_ttrpc::EventsClient, frame,
    network_ttrpc::NetworkClient, stdio_ttrpc::StdioClient, system_ttrpc::SystemClient,
};
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver, ClientStreamSender};
use ttrpc::context::{Context, with_duration};
use ttrpc::get_status;

use crate::guest::link::{HostPort, Link};
use crate::guest::replies;
use crate::host::text::clean;
use husk_vsock::{Stream, VsockError};

// A receive window holds the largest streamed message, a stdio chunk, with its envelope.
const _: () = assert!(RECEIVE_WINDOW >= 2 * husk_protos::STDIO_CHUNK);

/// Why a call to the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// One of the guest's ports cannot be reached.
    #[error("connect to the guest's vsock port {port}")]
    Connect {
        /// The port.
        port: u32,
        /// Why the connection failed.
        source: husk_vsock::VsockError,
    },
    /// The guest's init uses another protocol version.
    #[error(
        "the guest's init {version} speaks protocol {theirs}, this shim {PROTOCOL}: use the initrd that came with the shim"
    )]
    Protocol {
        /// The init's version.
        version: String,
        /// The init's protocol version.
        theirs: u32,
    },
    /// The guest's hello has no secret for connections.
    #[error("the guest's hello has a secret of {0} bytes instead of {SECRET}")]
    Secret(usize),
    /// The guest returned an error, or the connection failed. `From` makes it from the client's error: a status keeps
    /// only its code and a clean message that names the guest as its author. Not a `source`: it would repeat the
    /// message.
    #[error("{}", message(.0))]
    Call(ttrpc::Error),
    /// A raw stream could not be opened: the guest's error, or that of its connection.
    #[error("open a raw stream in the guest")]
    RawStream(#[source] io::Error),
}

impl From<ttrpc::Error> for GuestError {
    fn from(error: ttrpc::Error) -> Self {
        Self::Call(match error {
            ttrpc::Error::RpcStatus(status) => {
                ttrpc::Error::RpcStatus(get_status(status.code(), clean(&format!("guest: {}", status.message))))
            }
            other => other,
        })
    }
}

/// The guest's own message with its code, or ttrpc's for everything else.
fn message(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => format!("{} ({:?})", status.message, status.code()),
        other => clean(&other.to_string()),
    }
}

/// Why the guest did not connect to one of its addresses.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The guest cannot be reached.
    #[error("connect to the guest's relay")]
    Relay(#[from] VsockError),
    /// The guest's error, or that of the connection with it.
    #[error("connect in the guest")]
    Guest(#[from] io::Error),
    /// The guest did not answer.
    #[error("the guest did not answer within {} ms", .0.as_millis())]
    Deadline(Duration),
}

/// A stream on its own connection, and the meter that throttles its sender.
pub struct Metering<M> {
    stream: ClientStreamReceiver<M>,
    meter: Meter,
}

impl<M: Message + ttrpc::proto::Codec<E = protobuf::Error>> Metering<M> {
    /// A stream of the client on whose connection the meter is.
    pub(crate) fn new(stream: ClientStreamReceiver<M>, meter: Meter) -> Self {
        Self { stream, meter }
    }

    /// The next message; none at the end of the stream. There is no deadline: a stream lasts as long as its source.
    pub async fn recv(&mut self) -> Result<Option<M>, GuestError> {
        let message = self.stream.recv().await?;
        if let Some(message) = &message {
            self.meter.consumed(message);
        }
        Ok(message)
    }
}

/// Clients of one guest.
pub struct Guest {
    link: Link,
    secret: [u8; SECRET],
    call_timeout: Duration,
    raw_streams: bool,
    /// containerd's Task service.
    pub task: TaskClient,
    /// husk's Bundle service.
    pub bundle: BundleClient,
    /// husk's Disks service.
    pub disks: DisksClient,
    /// husk's System service.
    pub system: SystemClient,
    /// husk's Network service.
    pub network: NetworkClient,
    /// husk's Debug service. Only a guest in debug mode has it.
    pub debug: DebugClient,
}

impl Guest {
    /// Connects to a guest that has sent its hello.
    pub async fn connect(link: Link, hello: &Hello, call_timeout: Duration) -> Result<Self, GuestError> {
        let secret = accept(hello)?;
        let client = Client::new(replies::socket(connect(&link, PORT_TASK, &secret, call_timeout).await?));
        Ok(Self {
            task: TaskClient::new(client.clone()),
            bundle: BundleClient::new(client.clone()),
            disks: DisksClient::new(client.clone()),
            system: SystemClient::new(client.clone()),
            network: NetworkClient::new(client.clone()),
            debug: DebugClient::new(client),
            link,
            secret,
            call_timeout,
            raw_streams: hello.raw_streams,
        })
    }

    /// The connection to the guest.
    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// How long a call may take.
    pub(crate) fn call_timeout(&self) -> Duration {
        self.call_timeout
    }

    /// The context of a call, with its deadline.
    pub fn context(&self) -> Context {
        with_duration(self.call_timeout)
    }

    /// The guest's events after number `after`.
    pub async fn events(&self, after: u64) -> Result<Metering<Event>, GuestError> {
        let (client, meter) = self.stream_client(PORT_EVENTS).await?;
        let request = SubscribeRequest { after, ..Default::default() };
        Ok(Metering { stream: EventsClient::new(client).subscribe(Context::default(), &request).await?, meter })
    }

    /// Whether [`Self::raw_stream`] is to be used, and not [`Self::output`] and [`Self::input`].
    pub(crate) fn has_raw_streams(&self) -> bool {
        self.raw_streams
    }

    /// Opens a raw stream of a process ([`husk_protos::streams`]). Waits for the process as long as the guest does.
    pub(crate) async fn raw_stream(&self, container: &str, exec: &str, kind: StreamKind) -> Result<Stream, GuestError> {
        let stream = connect(&self.link, PORT_STREAMS, &self.secret, self.call_timeout).await?;
        open_raw_stream(stream, &stream_request(container, exec, kind)).await
    }

    /// The output of a process on one of its streams.
    pub async fn output(
        &self,
        container: &str,
        exec: &str,
        kind: StreamKind,
    ) -> Result<Metering<OutputChunk>, GuestError> {
        let (client, meter) = self.stream_client(PORT_STDIO).await?;
        let request = stream_request(container, exec, kind);
        Ok(Metering { stream: StdioClient::new(client).output(Context::default(), &request).await?, meter })
    }

    /// A process's stdin. An empty first chunk names the process.
    pub async fn input(
        &self,
        container: &str,
        exec: &str,
    ) -> Result<ClientStreamSender<InputChunk, InputResponse>, GuestError> {
        let (client, _meter) = self.stream_client(PORT_STDIO).await?;
        let stream = StdioClient::new(client).input(Context::default()).await?;
        let first = InputChunk { container_id: container.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        stream.send(&first).await?;
        Ok(stream)
    }

    /// Connects to an address of the VM. What follows on the stream is that of [`husk_protos::relay`].
    pub(crate) async fn dial(&self, target: SocketAddr, limit: Duration) -> Result<Stream, DialError> {
        let dial = async {
            let mut stream = self.link.connect(PORT_RELAY, &self.secret, limit).await?;
            write_target(&mut stream, Transport::Tcp, target).await?;
            read_status(&mut stream).await?;
            Ok(stream)
        };
        tokio::time::timeout(limit, dial).await.unwrap_or(Err(DialError::Deadline(limit)))
    }

    /// Sends a datagram to an address that the VM can reach, and returns the answer.
    pub(crate) async fn query(&self, target: SocketAddr, query: &[u8], limit: Duration) -> Result<Vec<u8>, DialError> {
        let answered = async {
            let mut stream = self.link.connect(PORT_RELAY, &self.secret, limit).await?;
            write_target(&mut stream, Transport::Udp, target).await?;
            Ok(datagram::query(&mut stream, query).await?)
        };
        tokio::time::timeout(limit, answered).await.unwrap_or(Err(DialError::Deadline(limit)))
    }

    /// Listens for the guest's DNS queries.
    pub(crate) fn listen_for_queries(&self) -> Result<HostPort, VsockError> {
        self.link.listen_for_queries()
    }

    /// Listens for the guest's connections to Unix sockets of the host.
    pub(crate) fn listen_for_relays(&self) -> Result<HostPort, VsockError> {
        self.link.listen_for_relays()
    }

    async fn stream_client(&self, port: u32) -> Result<(Client, Meter), GuestError> {
        let connected = connect(&self.link, port, &self.secret, self.call_timeout).await?;
        let (socket, meter) = Metered::new(connected, RECEIVE_WINDOW);
        Ok((Client::new(Socket::new(socket)), meter))
    }
}

fn stream_request(container: &str, exec: &str, kind: StreamKind) -> StreamRequest {
    let (container_id, exec_id) = (container.to_owned(), exec.to_owned());
    StreamRequest { container_id, exec_id, kind: kind.into(), ..Default::default() }
}

/// Requests a raw stream on a connection.
pub(crate) async fn open_raw_stream<S>(mut connected: S, request: &StreamRequest) -> Result<S, GuestError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |error| GuestError::RawStream(io::Error::other(error));
    frame::write(&mut connected, request).await.map_err(failed)?;
    read_status(&mut connected).await.map_err(GuestError::RawStream)?;
    Ok(connected)
}

/// The secret of a guest with which this shim can work.
pub(crate) fn accept(hello: &Hello) -> Result<[u8; SECRET], GuestError> {
    if hello.protocol != PROTOCOL {
        return Err(GuestError::Protocol { version: clean(&hello.version), theirs: hello.protocol });
    }
    hello.secret.as_slice().try_into().map_err(|_| GuestError::Secret(hello.secret.len()))
}

async fn connect(link: &Link, port: u32, secret: &[u8; SECRET], deadline: Duration) -> Result<Stream, GuestError> {
    link.connect(port, secret, deadline).await.map_err(|source| GuestError::Connect { port, source })
}

#[cfg(test)]
mod tests {
    use ttrpc::Code;

    use super::*;
    use crate::host::text::{LONGEST, is_unsafe};

    #[test]
    fn an_error_of_the_guest_is_short_and_printable_and_names_the_guest() {
        let hostile = format!("a\x1b[2J\n\u{202e}level=error {}", "\u{e9}".repeat(4_000_000));
        let error = GuestError::from(ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, hostile.clone())));
        assert!(error.to_string().starts_with("guest: a[2J level=error \u{e9}"), "{error}");
        assert!(error.to_string().ends_with("\u{e9}… (NOT_FOUND)"), "{error}");
        let GuestError::Call(ttrpc::Error::RpcStatus(status)) = &error else { panic!("{error}") };
        assert!(status.message.chars().count() == LONGEST && !status.message.contains(is_unsafe));
        let error = GuestError::from(ttrpc::Error::Others(hostile)).to_string();
        assert!(error.chars().count() == LONGEST && !error.contains(is_unsafe), "{error}");
    }
}
