//! Relays datagrams that are queries, such as those of DNS, between host and guest over vsock connections.
//!
//! A vsock connection carries one query and its answer, each as a frame: a 16-bit big-endian length, and as many bytes.
//! A query that gets no answer ends with the connection. Callers set the deadlines.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;

use crate::relay::{Duplex, Source, Work, serve_all};

/// Longest datagram, bytes: a frame's length has 16 bits, as the length field of UDP.
const LONGEST: usize = u16::MAX as usize;

/// Sends a query to the other side, and returns its answer.
///
/// # Errors
/// When the connection fails: there is no answer.
pub async fn query(peer: &mut dyn Duplex, query: &[u8]) -> io::Result<Vec<u8>> {
    write(peer, query).await?;
    read(peer).await
}

/// Answers the query of the other side, with what the server says to which `server` is connected.
///
/// # Errors
/// When the connection or the socket fails.
pub async fn answer(peer: &mut dyn Duplex, server: &UdpSocket) -> io::Result<()> {
    let query = read(peer).await?;
    server.send(&query).await?;
    let (answer, _) = receive(server).await?;
    write(peer, &answer).await
}

/// Answers the datagrams of a socket.
struct Answering<F> {
    socket: Arc<UdpSocket>,
    failed: fn(io::Error),
    answer: F,
}

impl<A: Future<Output = io::Result<Vec<u8>>> + Send + 'static, F: Fn(Vec<u8>, SocketAddr) -> A + Send + Sync> Source
    for Answering<F>
{
    fn next(&mut self) -> Pin<Box<dyn Future<Output = io::Result<Work>> + Send + '_>> {
        Box::pin(async {
            let (query, client) = receive(&self.socket).await?;
            let (answered, socket, failed) = ((self.answer)(query, client), self.socket.clone(), self.failed);
            Ok(Box::pin(async move {
                let replied = match answered.await {
                    Ok(answer) => socket.send_to(&answer, client).await.map(drop),
                    Err(error) => Err(error),
                };
                if let Err(error) = replied {
                    failed(error);
                }
            }) as Work)
        })
    }
}

/// Answers each datagram of a socket in a task of its own, as many at a time as `slots` has permits. Further ones wait in
/// the socket's buffer, or are lost, as those for a busy server. Reports failures to `failed`. Does not return; dropping
/// it ends the tasks.
pub fn serve<A: Future<Output = io::Result<Vec<u8>>> + Send + 'static>(
    socket: UdpSocket,
    slots: Arc<Semaphore>,
    failed: fn(io::Error),
    answer: impl Fn(Vec<u8>, SocketAddr) -> A + Send + Sync + 'static,
) -> Work {
    Box::pin(serve_all(Box::new(Answering { socket: Arc::new(socket), failed, answer }), slots, failed))
}

/// Receives a datagram.
async fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    loop {
        socket.readable().await?;
        // Only now: a socket that waits needs no buffer.
        let mut datagram = vec![0; LONGEST];
        match socket.try_recv_from(&mut datagram) {
            Ok((length, sender)) => {
                datagram.truncate(length);
                datagram.shrink_to_fit();
                return Ok((datagram, sender));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn write(peer: &mut dyn Duplex, datagram: &[u8]) -> io::Result<()> {
    let length = u16::try_from(datagram.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let frame = [&length.to_be_bytes(), datagram].concat();
    peer.write_all(&frame).await
}

async fn read(peer: &mut dyn Duplex) -> io::Result<Vec<u8>> {
    let mut datagram = vec![0; usize::from(peer.read_u16().await?)];
    peer.read_exact(&mut datagram).await?;
    Ok(datagram)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::duplex;

    use super::*;

    async fn bound() -> UdpSocket {
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()
    }

    /// A client, whose queries reach the server over two relays.
    async fn relayed(server: SocketAddr) -> UdpSocket {
        let (relay, client) = (bound().await, bound().await);
        client.connect(relay.local_addr().unwrap()).await.unwrap();
        let answer = move |bytes: Vec<u8>, _| async move {
            let (mut host, mut guest) = duplex(16);
            let socket = bound().await;
            socket.connect(server).await?;
            let (answered, answer) = tokio::join!(super::answer(&mut guest, &socket), query(&mut host, &bytes));
            answered.and(answer)
        };
        tokio::spawn(serve(relay, Arc::new(Semaphore::new(2)), |error| panic!("{error}"), answer));
        client
    }

    #[tokio::test]
    async fn each_client_gets_the_answer_to_its_query() {
        let server = bound().await;
        let address = server.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut query, client) = receive(&server).await.unwrap();
                query.reverse();
                server.send_to(&query, client).await.unwrap();
            }
        });
        let client = relayed(address).await;
        // The longest datagram over IPv4.
        for length in [0, 1, 600, 65_507] {
            let query: Vec<u8> = (0..length).map(|n: u32| n as u8).collect();
            client.send(&query).await.unwrap();
            let (answer, _) = receive(&client).await.unwrap();
            assert_eq!(answer, query.into_iter().rev().collect::<Vec<_>>(), "{length} bytes");
        }
    }

    #[tokio::test]
    async fn an_incomplete_query_is_an_error() {
        for bytes in [&b"\0"[..], b"\0\x05abc"] {
            let (mut host, mut guest) = duplex(16);
            host.write_all(bytes).await.unwrap();
            drop(host);
            let error = answer(&mut guest, &bound().await).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{bytes:?}");
        }
    }
}
