//! The Metadata service on a connection: TTRPC as its PROTOCOL.md has it, one request after the other. Not ttrpc's own server, which takes messages of
//! 4 MiB and as many requests at a time as a client sends: here a guest that may be hostile sends what it likes, and all of it is bounded, in bytes, in
//! connections and in time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::{Stream, StreamExt};
use husk_protos::metadata::{GetMetadataRequest, GetMetadataResponse};
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader, Request, Response, Status};

const SERVICE: &str = "husk.v1.Metadata";
const METHOD: &str = "Get";
/// Bytes of a request after its header: names, a deadline, and whatever a client adds as metadata.
pub(super) const REQUEST_BYTES: u32 = 4096;
/// Connections at a time, of one VM and of all.
pub(super) const CONNECTIONS: usize = 4;
const CONNECTIONS_OF_ALL: usize = 256;
/// For a request to come whole, for its answer to be found, and for that to be taken.
const STEP: Duration = Duration::from_secs(10);

/// Why a caller gets nothing: it is told so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// TTRPC's code.
    pub code: Code,
    /// In words.
    pub message: String,
}

/// Who knows the answers.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// What the VM with this CID is told.
    async fn get(&self, cid: u32) -> Result<GetMetadataResponse, Refusal>;
}

/// Why a connection was closed.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no {0} within {limit} s", limit = STEP.as_secs())]
    Late(&'static str),
    #[error("a frame of type {0}, which is no request")]
    NoRequest(u8),
    #[error("a request of {0} bytes is larger than {REQUEST_BYTES}")]
    TooLarge(u32),
    #[error("a request that cannot be decoded")]
    Undecodable,
    #[error("encode the answer: {0}")]
    Encode(#[from] protobuf::Error),
}

/// Answers on connections, each with the CID that it comes from, until there are no more to come. Those that are open then end by themselves.
pub async fn serve<S>(mut incoming: impl Stream<Item = (S, u32)> + Unpin, source: Arc<dyn Source>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let slots = Arc::new(Slots::default());
    while let Some((stream, cid)) = incoming.next().await {
        let Some(slot) = slots.take(cid) else {
            tracing::debug!(cid, "too many connections to the metadata service");
            continue;
        };
        let source = source.clone();
        tokio::spawn(async move {
            let _slot = slot;
            if let Err(error) = converse(stream, cid, &*source).await {
                tracing::debug!(cid, %error, "a connection to the metadata service was closed");
            }
        });
    }
}

/// Who has how many connections.
#[derive(Default)]
struct Slots(Mutex<HashMap<u32, usize>>);

struct Slot {
    of: Arc<Slots>,
    cid: u32,
}

impl Slots {
    fn take(self: &Arc<Self>, cid: u32) -> Option<Slot> {
        let mut taken = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if taken.values().sum::<usize>() >= CONNECTIONS_OF_ALL {
            return None;
        }
        let own = taken.entry(cid).or_default();
        if *own >= CONNECTIONS {
            return None;
        }
        *own += 1;
        Some(Slot { of: self.clone(), cid })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.of.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Entry::Occupied(mut own) = taken.entry(self.cid) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

async fn converse<S>(mut stream: S, cid: u32, source: &dyn Source) -> Result<(), Closed>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some((id, request)) = in_time("request", read(&mut stream)).await? {
        let answer = match check(&request) {
            Ok(()) => in_time("answer of the host", async { Ok(source.get(cid).await) }).await?,
            Err(refusal) => Err(refusal),
        };
        let frame = frame(id, answer)?;
        in_time("taker of the answer", async { Ok(stream.write_all(&frame).await?) }).await?;
    }
    Ok(())
}

async fn in_time<T>(what: &'static str, step: impl Future<Output = Result<T, Closed>>) -> Result<T, Closed> {
    timeout(STEP, step).await.map_err(|_| Closed::Late(what))?
}

/// The next request and its stream's number; none when there are no more.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<(u32, Request)>, Closed> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    if from.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[1..]).await?;
    let header = MessageHeader::from(header);
    if header.type_ != MESSAGE_TYPE_REQUEST {
        return Err(Closed::NoRequest(header.type_));
    }
    if header.length > REQUEST_BYTES {
        return Err(Closed::TooLarge(header.length));
    }
    let mut bytes = vec![0; header.length as usize];
    from.read_exact(&mut bytes).await?;
    let request = Request::parse_from_bytes(&bytes).map_err(|_| Closed::Undecodable)?;
    Ok(Some((header.stream_id, request)))
}

fn check(request: &Request) -> Result<(), Refusal> {
    if request.service != SERVICE || request.method != METHOD {
        let message = format!("there is only {SERVICE}/{METHOD} here");
        return Err(Refusal { code: Code::UNIMPLEMENTED, message });
    }
    match GetMetadataRequest::parse_from_bytes(&request.payload) {
        Ok(_) => Ok(()),
        Err(_) => Err(Refusal { code: Code::INVALID_ARGUMENT, message: "the request cannot be decoded".to_owned() }),
    }
}

fn frame(stream: u32, answer: Result<GetMetadataResponse, Refusal>) -> Result<Vec<u8>, Closed> {
    let mut response = Response::new();
    match answer {
        Ok(answer) => response.payload = answer.write_to_bytes()?,
        Err(Refusal { code, message }) => {
            response.status = Some(Status { code: code.into(), message, ..Default::default() }).into();
        }
    }
    // A workspace and a token are far from the 4 GiB that the header can say.
    let length = response.compute_size() as usize;
    let mut frame: Vec<u8> = MessageHeader::new_response(stream, length as u32).into();
    frame.reserve_exact(length);
    response.write_to_vec(&mut frame)?;
    Ok(frame)
}
