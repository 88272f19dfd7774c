//! Names of docker's networks: relays the containers' DNS queries to docker's DNS server, and that server's own queries
//! to the VM.
//!
//! For the containers of a user-defined network, docker runs a DNS server in the sandbox's network namespace on the host,
//! at 127.0.0.11. The guest relays queries to that address. It cannot name another one. What the server does not know, it
//! asks other servers, whose replies would reach the VM: so the VM asks them, as the container would under runc.

use std::io;
use std::net::{SocketAddr, UdpSocket as StdSocket};
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::relay::{Transport, relay};
use husk_protos::{NAME_SERVER, datagram};
use husk_vsock::{Stream, VsockError};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{QUERIES_MAX, RedirectError, Running, add_rules, address, reply, serve_guest};
use crate::guest::client::Guest;
use crate::network::loopback::{
    Connections, Queries, connect_to_name_server, intercept_queries, socket_to_name_server,
};
use crate::network::{Claim, NetworkError};
use crate::state::journal::Journal;

/// Time for the guest to name the protocol.
const PROTOCOL: Duration = Duration::from_secs(10);
/// Time for docker's server to accept.
const CONNECT: Duration = Duration::from_secs(5);
/// Time for an answer. docker's server asks up to three others, each for four seconds.
const ANSWER: Duration = Duration::from_secs(15);

/// Relays queries from the first time that they need it until it is dropped.
pub(crate) struct Names {
    claim: Claim,
    sandbox: String,
    journal: Journal,
    relaying: Option<Relaying>,
}

struct Relaying {
    port: u32,
    #[expect(dead_code, reason = "dropping ends the tasks")]
    tasks: Vec<Running>,
}

impl Names {
    /// For the sandbox whose VM is connected to this namespace.
    pub(crate) fn new(claim: Claim, sandbox: String, journal: Journal) -> Self {
        Self { claim, sandbox, journal, relaying: None }
    }

    /// Relays the guest's queries, and those of the server, and returns the host's vsock port for the former. Without the
    /// kernel's help, such as nf_tables, the names of the network's containers work and others do not: the failure is
    /// logged.
    ///
    /// # Errors
    ///
    /// The guest's queries cannot be relayed.
    pub(crate) async fn relay(&mut self, guest: &Arc<Guest>) -> Result<u32, VsockError> {
        if let Some(relaying) = &self.relaying {
            return Ok(relaying.port);
        }
        let listener = guest.listen_for_queries()?;
        let port = listener.number();
        let claim = self.claim.clone();
        let serve = serve_guest(listener, QUERIES_MAX, move |guest| answer(guest, claim.clone()));
        let mut tasks = vec![Running(tokio::spawn(serve).abort_handle())];
        match self.redirect(guest).await {
            Ok(redirected) => tasks.extend(redirected),
            Err(error) => tracing::warn!(
                error = %Chain(&error),
                "docker's DNS server only resolves names of containers: its own queries are not forwarded through the VM"
            ),
        }
        self.relaying = Some(Relaying { port, tasks });
        Ok(port)
    }

    /// Redirects the server's own queries, and relays them to the guest.
    async fn redirect(&self, guest: &Arc<Guest>) -> Result<Vec<Running>, RedirectError> {
        let intercepted = add_rules(&self.claim, &self.sandbox, &self.journal, intercept_queries).await?;
        let Queries { streams, datagrams, connections } = intercepted;
        let (slots, connections) = (Arc::new(Semaphore::new(QUERIES_MAX)), Arc::new(connections));
        let mut tasks = Vec::new();
        for stream in streams {
            let forward = address::forward_all(TcpListener::from_std(stream)?, guest, &slots);
            tasks.push(Running(tokio::spawn(forward).abort_handle()));
        }
        for socket in datagrams {
            let local = socket.local_addr()?;
            let (guest, connections) = (guest.clone(), connections.clone());
            let ask = move |query, client| ask(query, client, local, guest.clone(), connections.clone());
            let serve = datagram::serve(UdpSocket::from_std(socket)?, slots.clone(), unanswered, ask);
            tasks.push(Running(tokio::spawn(serve).abort_handle()));
        }
        Ok(tasks)
    }
}

/// Relays one query of the guest, or a connection with queries.
async fn answer(mut guest: Stream, claim: Claim) {
    let answered = match timeout(PROTOCOL, Transport::read(&mut guest)).await {
        Ok(Ok(Transport::Udp)) => answer_datagram(&mut guest, claim).await,
        Ok(Ok(Transport::Tcp)) => answer_stream(&mut guest, claim).await,
        Ok(Err(error)) => Err(error),
        Err(late) => Err(late.into()),
    };
    if let Err(error) = answered {
        tracing::debug!(error = %Chain(&error), "a DNS query of the guest got no answer");
    }
}

async fn answer_datagram(guest: &mut Stream, claim: Claim) -> io::Result<()> {
    let server: StdSocket = in_namespace(move || socket_to_name_server(&claim, CONNECT)).await?;
    timeout(ANSWER, datagram::answer(guest, &UdpSocket::from_std(server)?)).await?
}

async fn answer_stream(guest: &mut Stream, claim: Claim) -> io::Result<()> {
    let connected = in_namespace(move || connect_to_name_server(&claim, CONNECT)).await.and_then(TcpStream::from_std);
    reply(guest, &connected).await?;
    relay(&mut connected?, guest).await.map_err(io::Error::other)
}

async fn in_namespace<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await?.map_err(io::Error::other)
}

fn unanswered(error: io::Error) {
    tracing::debug!(error = %Chain(&error), "a DNS query got no answer");
}

/// Asks the server that a client in the namespace meant.
async fn ask(
    query: Vec<u8>,
    client: SocketAddr,
    local: SocketAddr,
    guest: Arc<Guest>,
    connections: Arc<Connections>,
) -> io::Result<Vec<u8>> {
    let target = connections.original_destination(client, local).map_err(io::Error::other)?;
    if target.port() != NAME_SERVER.port() {
        let meant = format!("{target} is no DNS server");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, meant));
    }
    guest.query(target, &query, ANSWER).await.map_err(io::Error::other)
}
