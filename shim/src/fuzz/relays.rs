//! What the guest sends on connections that it opens, and on those that the shim opens to its relay.

use std::sync::Mutex;

use async_trait::async_trait;
use husk_protos::chain::Chain;
use husk_protos::datagram;
use husk_protos::lock::lock;
use husk_protos::metadata::GetMetadataResponse;
use husk_protos::relay::{RelayError, Transport, read_status, relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::checks::harmless;
use super::wire::{Wire, run};
use crate::host::text::LONGEST;
use crate::metadata::service::{BURST, MetadataSource, Rates, Refusal, serve_connection};

/// Bytes that a program of the host accepts.
const LOCAL: usize = 1 << 20;

/// A connection: a byte that selects what is read, one for the size of the pieces, and the bytes.
pub fn relays(bytes: &[u8]) {
    let [kind, piece, rest @ ..] = bytes else { return };
    let mut guest = Wire::sends(rest, usize::from(*piece) + 1);
    match kind % 4 {
        0 | 1 => stream(&mut guest, rest),
        2 => {
            if let Ok(answer) = run(datagram::query(&mut guest, b"query")) {
                assert_eq!(rest.get(2..2 + answer.len()), Some(&*answer));
            }
        }
        _ => run(async {
            let status = read_status(&mut guest).await;
            assert_eq!(status.is_ok(), rest.first() == Some(&0));
            let transport = Transport::read(&mut guest).await;
            assert_eq!(transport.is_ok(), matches!(rest.get(1), Some(6 | 17)));
        }),
    }
}

/// A program of the host receives what the frames contain, and an end only if the guest has sent one.
fn stream(guest: &mut Wire, sent: &[u8]) {
    let (mut expected, mut rest, mut ended) = (Vec::new(), sent, false);
    while let [high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length == 0 {
            ended = true;
            break;
        }
        let (data, after) = after.split_at(after.len().min(length));
        expected.extend_from_slice(data);
        rest = after;
    }
    let (relayed, received) = run(async {
        let (mut local, mut program) = tokio::io::duplex(LOCAL);
        program.shutdown().await.expect("a connection in memory");
        let relayed = relay(&mut local, guest).await;
        drop(local);
        let mut received = Vec::new();
        program.read_to_end(&mut received).await.expect("a connection in memory");
        (relayed, received)
    });
    assert_eq!(received, expected);
    assert!(matches!((&relayed, ended), (Ok(()), true) | (Err(RelayError::Peer(_)), false)), "{relayed:?}");
}

/// Counts the answers.
#[derive(Default)]
struct Source(Mutex<usize>);

#[async_trait]
impl MetadataSource for Source {
    async fn get(&self, _cid: u32, audience: String) -> Result<GetMetadataResponse, Refusal> {
        harmless_audience(&audience);
        *lock(&self.0) += 1;
        Ok(GetMetadataResponse { token: audience, ..Default::default() })
    }
}

fn harmless_audience(audience: &str) {
    assert!((1..=255).contains(&audience.len()) && !audience.contains(char::is_control), "{audience:?}");
}

/// A connection to the metadata service: a byte for the size of the pieces, and the requests.
pub fn metadata(bytes: &[u8]) {
    let Some((&piece, requests)) = bytes.split_first() else { return };
    let (guest, source) = (Wire::sends(requests, usize::from(piece) + 1), Source::default());
    let served = run(serve_connection(guest, 3, &source, &Rates::default()));
    if let Err(error) = served {
        harmless(&Chain(&error).to_string(), LONGEST);
    }
    // One more per second, and an input does not take as long.
    let answers = *lock(&source.0);
    assert!(answers as f64 <= BURST + 1.0, "{answers} answers");
    assert!(answers <= requests.len(), "{answers} answers to {} bytes", requests.len());
}
