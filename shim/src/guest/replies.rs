//! Limits what the guest sends on a connection for calls that have one reply each.
//!
//! ttrpc accepts messages of 4 MiB, and a decoded message can take a hundred times as much memory: a field of four bytes
//! may become a map of lists. ttrpc also keeps an entry for each call that a message of a stream has answered. Both kinds
//! of messages become errors of their calls before ttrpc reads them.

use std::io::Result;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use protobuf::{Message, MessageField};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::r#async::transport::Socket;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader, Response};
use ttrpc::{Code, get_status};

/// Largest reply, bytes. The largest one of an honest guest lists a container's processes: seven bytes for each of the
/// 65,536 that the shim accepts, and some hundred more for an exec.
pub(crate) const REPLY_MAX: usize = 512 * 1024;

/// A socket for a client whose calls have one reply each.
pub(crate) fn socket(connected: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Socket {
    let (read, write) = tokio::io::split(connected);
    let replies = Replies { inner: read, header: Vec::new(), ready: Vec::new(), passed: 0, dropped: 0 };
    Socket::new(tokio::io::join(replies, write))
}

struct Replies<S> {
    inner: S,
    /// The received part of the next message's header.
    header: Vec<u8>,
    /// What ttrpc reads next.
    ready: Vec<u8>,
    /// The bytes of the message that ttrpc reads after that.
    passed: usize,
    /// Those that it does not read.
    dropped: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Replies<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                let room = buffer.remaining().min(this.ready.len());
                buffer.put_slice(&this.ready[..room]);
                this.ready.drain(..room);
                return Poll::Ready(Ok(()));
            }
            if this.passed > 0 {
                let room = buffer.remaining().min(this.passed);
                let read = ready!(read_some(&mut this.inner, cx, buffer.initialize_unfilled_to(room)))?;
                buffer.advance(read);
                this.passed -= read;
                return Poll::Ready(Ok(()));
            }
            let mut part = [0; 4096];
            let wanted = if this.dropped > 0 { this.dropped } else { MESSAGE_HEADER_LENGTH - this.header.len() };
            let wanted = wanted.min(part.len());
            let read = ready!(read_some(&mut this.inner, cx, &mut part[..wanted]))?;
            if read == 0 {
                return Poll::Ready(Ok(()));
            }
            if this.dropped > 0 {
                this.dropped -= read;
            } else {
                this.header.extend_from_slice(&part[..read]);
                if this.header.len() == MESSAGE_HEADER_LENGTH {
                    this.admit();
                }
            }
        }
    }
}

impl<S> Replies<S> {
    /// Decides about the message whose header is complete.
    fn admit(&mut self) {
        let bytes = std::mem::take(&mut self.header);
        let header = MessageHeader::from(&bytes);
        let length = header.length as usize;
        let problem = match header.type_ {
            MESSAGE_TYPE_RESPONSE if length <= REPLY_MAX => {
                (self.ready, self.passed) = (bytes, length);
                return;
            }
            MESSAGE_TYPE_RESPONSE => format!("its reply of {length} bytes is larger than {REPLY_MAX}"),
            kind => format!("its message of type {kind} is no reply"),
        };
        (self.ready, self.dropped) = (failure(header.stream_id, problem), length);
    }
}

/// A reply with an error.
fn failure(stream: u32, problem: String) -> Vec<u8> {
    let status = get_status(Code::RESOURCE_EXHAUSTED, problem);
    let response = Response { status: MessageField::some(status), ..Default::default() };
    // Cannot fail: the message is short.
    let response = response.write_to_bytes().unwrap_or_default();
    let mut frame: Vec<u8> = MessageHeader::new_response(stream, response.len() as u32).into();
    frame.extend_from_slice(&response);
    frame
}

/// Reads what there is. Returns 0 at the end.
fn read_some(from: &mut (impl AsyncRead + Unpin), cx: &mut Context<'_>, into: &mut [u8]) -> Poll<Result<usize>> {
    let mut part = ReadBuf::new(into);
    ready!(Pin::new(from).poll_read(cx, &mut part))?;
    Poll::Ready(Ok(part.filled().len()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use ttrpc::r#async::Client;
    use ttrpc::proto::{FLAG_REMOTE_CLOSED, MESSAGE_TYPE_DATA, Request};

    use super::*;

    /// A message to the call with this number, in pieces.
    async fn send(guest: &mut DuplexStream, kind: u8, call: u32, payload: &[u8]) {
        let mut header = MessageHeader::new_response(2 * call + 1, payload.len() as u32);
        (header.type_, header.flags) = (kind, FLAG_REMOTE_CLOSED);
        let mut frame: Vec<u8> = header.into();
        frame.extend_from_slice(payload);
        let (begin, rest) = frame.split_at(7);
        guest.write_all(begin).await.unwrap();
        tokio::task::yield_now().await;
        guest.write_all(rest).await.unwrap();
    }

    async fn take_request(guest: &mut DuplexStream) {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        guest.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; MessageHeader::from(header).length as usize];
        guest.read_exact(&mut payload).await.unwrap();
    }

    #[tokio::test]
    async fn a_large_reply_or_one_that_is_a_stream_fails_its_call_and_no_other() {
        let (host, mut guest) = tokio::io::duplex(64 * 1024);
        let client = Client::new(socket(host));
        let reply = |length: usize| {
            // Without the envelope: a tag and a length.
            let payload = vec![7; length.saturating_sub(4)];
            Response { payload, ..Default::default() }.write_to_bytes().unwrap()
        };
        let largest = reply(REPLY_MAX);
        assert_eq!(largest.len(), REPLY_MAX);
        let sent = [
            (MESSAGE_TYPE_RESPONSE, reply(5), Ok(1)),
            (MESSAGE_TYPE_RESPONSE, largest, Ok(REPLY_MAX - 4)),
            (MESSAGE_TYPE_RESPONSE, vec![0; REPLY_MAX + 1], Err("its reply of 524289 bytes is larger than 524288")),
            (MESSAGE_TYPE_RESPONSE, vec![0; 8 << 20], Err("its reply of 8388608 bytes is larger than 524288")),
            (MESSAGE_TYPE_DATA, reply(5), Err("its message of type 3 is no reply")),
            (MESSAGE_TYPE_DATA, Vec::new(), Err("its message of type 3 is no reply")),
            (MESSAGE_TYPE_RESPONSE, reply(6), Ok(2)),
        ];
        for (call, (kind, payload, expected)) in sent.into_iter().enumerate() {
            let request = Request { service: "s".into(), method: "m".into(), ..Default::default() };
            let answer = async {
                take_request(&mut guest).await;
                send(&mut guest, kind, call as u32, &payload).await;
            };
            let (received, ()) = tokio::join!(client.request(request), answer);
            match (received, expected) {
                (Ok(response), Ok(length)) => assert_eq!(response.payload.len(), length, "{call}"),
                (Err(ttrpc::Error::RpcStatus(status)), Err(message)) => assert_eq!(status.message, message, "{call}"),
                (received, expected) => panic!("{call}: {received:?} instead of {expected:?}"),
            }
        }
    }
}
