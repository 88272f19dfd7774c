//! The Metadata service on a connection: TTRPC (containerd/ttrpc, PROTOCOL.md), one request at a time. The guest may be
//! hostile, so its bytes, its connections and its time are limited. ttrpc's own server is not used: it accepts messages
//! of 4 MiB, and any number of concurrent requests.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::{Stream, StreamExt};
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::metadata::{GetMetadataRequest, GetMetadataResponse};
use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use ttrpc::Code;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MessageHeader, Request, Response, Status};

use crate::host::rate::{Admitted, Bucket};
use crate::metadata::token;

const SERVICE: &str = "husk.v1.Metadata";
const METHOD: &str = "Get";
/// Size limit of a request without its header, bytes. A request contains names, a deadline and the client's metadata.
pub(super) const REQUEST_BYTES: u32 = 4096;
/// Limit of concurrent connections of one VM.
pub(super) const CONNECTIONS: usize = 4;
/// Limit of concurrent connections of all VMs.
const TOTAL_CONNECTIONS: usize = 256;
/// Requests of one VM that are answered at once.
pub(crate) const BURST: f64 = 20.0;
/// Requests of one VM that are answered in the long run, per second: a token is valid for minutes.
const PER_SECOND: f64 = 1.0;
/// VMs whose limit is remembered. Beyond, those are forgotten that are as good as new.
const REMEMBERED: usize = 256;
/// Time limit for each step of a request: to receive it, to find the answer, and to send it.
const STEP: Duration = Duration::from_secs(10);

/// The error that a caller receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) message: String,
}

/// Finds the metadata of VMs.
#[async_trait]
pub(crate) trait MetadataSource: Send + Sync + 'static {
    /// The response for the VM with this CID, with a token for this audience.
    async fn get(&self, cid: u32, audience: String) -> Result<GetMetadataResponse, Refusal>;
}

/// Why the host closed a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no {0} within {limit} s", limit = STEP.as_secs())]
    Late(&'static str),
    #[error("a frame of type {0} instead of a request")]
    NotARequest(u8),
    #[error("a request of {0} bytes is larger than {REQUEST_BYTES}")]
    TooLarge(u32),
    #[error("a request that cannot be decoded")]
    Undecodable,
    #[error("encode the response")]
    Encode(#[from] protobuf::Error),
}

/// Serves connections, each with the CID of its guest, until `incoming` ends. Open connections are served until they
/// end.
pub(super) async fn serve<S>(mut incoming: impl Stream<Item = (S, u32)> + Unpin, source: Arc<dyn MetadataSource>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connections = Arc::new(Connections::default());
    let rates = Arc::new(Rates::default());
    while let Some((stream, cid)) = incoming.next().await {
        let Some(permit) = connections.open(cid) else {
            tracing::debug!(cid, "too many connections to the metadata service");
            continue;
        };
        let (source, rates) = (source.clone(), rates.clone());
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = serve_connection(stream, cid, &*source, &rates).await {
                tracing::debug!(cid, error = %Chain(&error), "closed a connection to the metadata service");
            }
        });
    }
}

/// How often each VM asks, by CID.
#[derive(Default)]
pub(crate) struct Rates(Mutex<HashMap<u32, Bucket>>);

impl Rates {
    /// Asks for one request of a VM.
    fn admit(&self, cid: u32) -> Result<(), Refusal> {
        let now = Instant::now();
        let mut rates = lock(&self.0);
        if rates.len() >= REMEMBERED {
            rates.retain(|_, bucket| !bucket.is_full(now));
        }
        match rates.entry(cid).or_insert_with(|| Bucket::new(BURST, PER_SECOND, now)).admit(now) {
            Admitted::Yes { .. } => Ok(()),
            Admitted::No => {
                let message =
                    format!("more than {BURST} requests at once, or {PER_SECOND} per second: use a token again");
                Err(Refusal { code: Code::RESOURCE_EXHAUSTED, message })
            }
        }
    }
}

/// The number of open connections by CID.
#[derive(Default)]
struct Connections(Mutex<HashMap<u32, usize>>);

/// One open connection.
struct ConnectionPermit {
    counts: Arc<Connections>,
    cid: u32,
}

impl Connections {
    /// Counts another connection, if the limits allow it.
    fn open(self: &Arc<Self>, cid: u32) -> Option<ConnectionPermit> {
        let mut counts = lock(&self.0);
        if counts.values().sum::<usize>() >= TOTAL_CONNECTIONS {
            return None;
        }
        let own = counts.entry(cid).or_default();
        if *own >= CONNECTIONS {
            return None;
        }
        *own += 1;
        Some(ConnectionPermit { counts: self.clone(), cid })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts.0);
        if let Entry::Occupied(mut own) = counts.entry(self.cid) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

/// Answers the requests of a connection, one after another.
pub(crate) async fn serve_connection<S>(
    mut stream: S,
    cid: u32,
    source: &dyn MetadataSource,
    rates: &Rates,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some((id, request)) = in_time("request", read(&mut stream)).await? {
        let answer = match rates.admit(cid).and_then(|()| check(&request)) {
            Ok(audience) => in_time("response of the host", async { Ok(source.get(cid, audience).await) }).await?,
            Err(refusal) => Err(refusal),
        };
        let frame = frame(id, answer)?;
        in_time("reader of the response", async { Ok(stream.write_all(&frame).await?) }).await?;
    }
    Ok(())
}

async fn in_time<T>(
    what: &'static str,
    step: impl Future<Output = Result<T, ConnectionError>>,
) -> Result<T, ConnectionError> {
    timeout(STEP, step).await.map_err(|_| ConnectionError::Late(what))?
}

/// The next request and its stream ID; none when the guest has closed the connection.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<(u32, Request)>, ConnectionError> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    if from.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[1..]).await?;
    let header = MessageHeader::from(header);
    if header.type_ != MESSAGE_TYPE_REQUEST {
        return Err(ConnectionError::NotARequest(header.type_));
    }
    if header.length > REQUEST_BYTES {
        return Err(ConnectionError::TooLarge(header.length));
    }
    let mut bytes = vec![0; header.length as usize];
    from.read_exact(&mut bytes).await?;
    let request = Request::parse_from_bytes(&bytes).map_err(|_| ConnectionError::Undecodable)?;
    Ok(Some((header.stream_id, request)))
}

/// The audience of the requested token.
fn check(request: &Request) -> Result<String, Refusal> {
    if request.service != SERVICE || request.method != METHOD {
        let message = format!("the only method is {SERVICE}/{METHOD}");
        return Err(Refusal { code: Code::UNIMPLEMENTED, message });
    }
    let invalid = |message| Refusal { code: Code::INVALID_ARGUMENT, message };
    let decoded = GetMetadataRequest::parse_from_bytes(&request.payload);
    let request = decoded.map_err(|_| invalid("the request cannot be decoded".to_owned()))?;
    token::audience(&request.audience).map(str::to_owned).map_err(invalid)
}

fn frame(stream: u32, answer: Result<GetMetadataResponse, Refusal>) -> Result<Vec<u8>, ConnectionError> {
    let mut response = Response::new();
    match answer {
        Ok(answer) => response.payload = answer.write_to_bytes()?,
        Err(Refusal { code, message }) => {
            response.status = Some(Status { code: code.into(), message, ..Default::default() }).into();
        }
    }
    // A workspace and a token are far smaller than 4 GiB, the header's limit.
    let length = response.compute_size() as usize;
    let mut frame: Vec<u8> = MessageHeader::new_response(stream, length as u32).into();
    frame.reserve_exact(length);
    response.write_to_vec(&mut frame)?;
    Ok(frame)
}
