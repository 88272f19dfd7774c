//! The guest as the shim calls it: TTRPC clients over its vsock link, each call with a deadline.
//!
//! Nothing that the guest answers is trusted: it is bounded before it is kept, and never a path on the host.

use std::time::Duration;

use containerd_shim_protos::shim_async::TaskClient;
use husk_protos::debug_ttrpc::DebugClient;
use husk_protos::events::{Event, SubscribeRequest};
use husk_protos::metered::{Meter, Metered};
use husk_protos::stdio::{InputChunk, InputResponse, OutputChunk, OutputRequest, StreamKind};
use husk_protos::system::Hello;
use husk_protos::{
    PORT_EVENTS, PORT_STDIO, PORT_TASK, PROTOCOL, RECEIVE_WINDOW, bundle_ttrpc::BundleClient,
    events_ttrpc::EventsClient, stdio_ttrpc::StdioClient, system_ttrpc::SystemClient,
};
use protobuf::Message;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver, ClientStreamSender};
use ttrpc::context::{Context, with_duration};

use crate::guest::link::Link;
use husk_vsock::Stream;

/// Most bytes of one event, stdio chunk or other streamed message with its envelope; what a receive window has to hold.
const _: () = assert!(RECEIVE_WINDOW >= 2 * husk_protos::STDIO_CHUNK);

/// Why the guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection to one of its ports.
    #[error("connect to the guest's vsock port {port}: {source}")]
    Connect {
        /// The port.
        port: u32,
        /// Why not.
        source: husk_vsock::VsockError,
    },
    /// It speaks another version of the wire.
    #[error(
        "the guest's init {version} speaks protocol {theirs}, this shim {PROTOCOL}: use the initrd that came with the shim"
    )]
    Protocol {
        /// The init's version.
        version: String,
        /// Its protocol.
        theirs: u32,
    },
    /// A call failed.
    #[error("{}", said(.0))]
    Call(#[from] ttrpc::Error),
}

/// A refusal in the guest's own words; whatever else went wrong in ttrpc's.
fn said(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => format!("{} ({:?})", status.message, status.code()),
        other => other.to_string(),
    }
}

/// A stream with a connection to itself, and the meter that holds its sender back.
pub struct Metering<M> {
    stream: ClientStreamReceiver<M>,
    meter: Meter,
}

impl<M: Message + ttrpc::proto::Codec<E = protobuf::Error>> Metering<M> {
    /// The next message; none at the stream's end. Has no deadline: streams are as long as what they carry.
    pub async fn recv(&mut self) -> ttrpc::Result<Option<M>> {
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
    call_timeout: Duration,
    /// containerd's Task service.
    pub task: TaskClient,
    /// husk's Bundle service.
    pub bundle: BundleClient,
    /// husk's System service.
    pub system: SystemClient,
    /// husk's Debug service, which only a guest in debug mode has.
    pub debug: DebugClient,
}

impl Guest {
    /// Connects to a guest that has said that it is ready.
    pub async fn connect(link: Link, hello: &Hello, call_timeout: Duration) -> Result<Self, Error> {
        if hello.protocol != PROTOCOL {
            return Err(Error::Protocol { version: hello.version.clone(), theirs: hello.protocol });
        }
        let client = Client::new(Socket::new(connect(&link, PORT_TASK, call_timeout).await?));
        Ok(Self {
            task: TaskClient::new(client.clone()),
            bundle: BundleClient::new(client.clone()),
            system: SystemClient::new(client.clone()),
            debug: DebugClient::new(client),
            link,
            call_timeout,
        })
    }

    /// The context of a call: its deadline.
    pub fn context(&self) -> Context {
        with_duration(self.call_timeout)
    }

    /// The guest's events after number `after`.
    pub async fn events(&self, after: u64) -> Result<Metering<Event>, Error> {
        let (client, meter) = self.stream_client(PORT_EVENTS).await?;
        let request = SubscribeRequest { after, ..Default::default() };
        Ok(Metering { stream: EventsClient::new(client).subscribe(Context::default(), &request).await?, meter })
    }

    /// What a process writes to one of its streams.
    pub async fn output(&self, container: &str, exec: &str, kind: StreamKind) -> Result<Metering<OutputChunk>, Error> {
        let (client, meter) = self.stream_client(PORT_STDIO).await?;
        let request = OutputRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            kind: kind.into(),
            ..Default::default()
        };
        Ok(Metering { stream: StdioClient::new(client).output(Context::default(), &request).await?, meter })
    }

    /// A process's stdin, opened by its first chunk.
    pub async fn input(
        &self,
        container: &str,
        exec: &str,
    ) -> Result<ClientStreamSender<InputChunk, InputResponse>, Error> {
        let (client, _meter) = self.stream_client(PORT_STDIO).await?;
        let stream = StdioClient::new(client).input(Context::default()).await?;
        let first = InputChunk { container_id: container.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        stream.send(&first).await?;
        Ok(stream)
    }

    async fn stream_client(&self, port: u32) -> Result<(Client, Meter), Error> {
        let (socket, meter) = Metered::new(connect(&self.link, port, self.call_timeout).await?, RECEIVE_WINDOW);
        Ok((Client::new(Socket::new(socket)), meter))
    }
}

async fn connect(link: &Link, port: u32, deadline: Duration) -> Result<Stream, Error> {
    link.connect(port, deadline).await.map_err(|source| Error::Connect { port, source })
}
