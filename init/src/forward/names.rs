//! DNS queries to 127.0.0.11: docker's DNS server listens there in the sandbox's network namespace on the host, and the
//! `resolv.conf` of docker's containers names it.
//!
//! Like docker's server, PID 1 listens on a random port, to which a rule redirects: port 53 stays free for the containers'
//! own servers.

use std::io;
use std::net::{Ipv4Addr, TcpListener as StdListener, UdpSocket as StdSocket};
use std::sync::Arc;
use std::time::Duration;

use husk_protos::datagram;
use husk_protos::relay::{Transport, serve};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Listeners, QUERIES_MAX, host, redirect};

/// Time for an answer: longer than the host's own wait.
const ANSWER: Duration = Duration::from_secs(20);
/// Attempts to find a port that is free for TCP and UDP. Nearly all are.
const ATTEMPTS: u32 = 16;

/// Relays queries while there is a server.
#[derive(Debug, Default)]
pub(crate) struct Names(Option<(u32, Listeners)>);

impl Names {
    /// Relays queries to a port of the host, or none if it is 0. Blocks for a moment; needs a Tokio runtime.
    ///
    /// # Errors
    /// The sockets cannot be created, or the kernel rejects the rule. The next call tries again.
    pub(crate) fn relay_to(&mut self, port: u32) -> io::Result<()> {
        if self.0.as_ref().map_or(0, |(current, _)| *current) == port {
            return Ok(());
        }
        if self.0.is_some() {
            redirect::remove()?;
            self.0 = None;
        }
        if port != 0 {
            self.0 = Some((port, listen(port)?));
        }
        Ok(())
    }
}

fn listen(port: u32) -> io::Result<Listeners> {
    let (stream, datagram, local) = bind()?;
    let slots = Arc::new(Semaphore::new(QUERIES_MAX));
    let streams = serve(stream, slots.clone(), failed, move |client| async move {
        host::forward(Box::new(client), &[Transport::Tcp as u8], port).await;
    });
    let datagrams = datagram::serve(datagram, slots, failed, move |query, _| ask(query, port));
    let listeners = Listeners(vec![tokio::spawn(streams).abort_handle(), tokio::spawn(datagrams).abort_handle()]);
    redirect::add(local)?;
    Ok(listeners)
}

/// Sockets for TCP and UDP with one port, in the thread's network namespace.
fn bind() -> io::Result<(TcpListener, UdpSocket, u16)> {
    let mut attempt = 1;
    loop {
        let stream = StdListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = stream.local_addr()?.port();
        match StdSocket::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(datagram) => {
                stream.set_nonblocking(true)?;
                datagram.set_nonblocking(true)?;
                return Ok((TcpListener::from_std(stream)?, UdpSocket::from_std(datagram)?, port));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

fn failed(error: io::Error) {
    tracing::debug!(%error, "a DNS query got no answer");
}

/// Relays one datagram of a container.
async fn ask(query: Vec<u8>, port: u32) -> io::Result<Vec<u8>> {
    let answered = async {
        let mut host = host::connect(&[Transport::Udp as u8], port).await?;
        datagram::query(&mut host, &query).await
    };
    timeout(ANSWER, answered).await?
}
