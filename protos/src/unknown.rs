//! Answers calls of services that a TTRPC server does not have with Unimplemented, as containerd's TTRPC does. ttrpc's
//! own server answers InvalidArgument, and clients that probe for a service take that for a failure.
//!
//! [`Guarded`] looks at each request on its way to the server. A request for an unknown service goes to a placeholder
//! without methods instead: the server answers that the method is not implemented. The method's name contains the
//! service's.

use std::collections::HashMap;
use std::io::Result;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use protobuf::{CodedInputStream, Message};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::r#async::Service;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, Request};

/// The service without methods.
const PLACEHOLDER: &str = "husk.v1.Unknown";
/// Field and wire type of the service's name in a request (ttrpc, request.proto).
const SERVICE_TAG: u32 = 1 << 3 | 2;
/// Where a header has the frame's type.
const TYPE: usize = 8;

/// The services of a server.
#[derive(Debug, Clone)]
pub struct Known(Arc<[String]>);

impl Known {
    /// Adds the placeholder to a server's services. The server's connections have to be [`Self::guard`]ed.
    pub fn of(services: &mut HashMap<String, Service>) -> Self {
        let known = services.keys().cloned().collect();
        services.insert(PLACEHOLDER.to_owned(), Service { methods: HashMap::new(), streams: HashMap::new() });
        Self(known)
    }

    /// Wraps a connection.
    pub fn guard<S>(&self, inner: S) -> Guarded<S> {
        Guarded { inner, frames: Frames { known: self.clone(), ..Frames::default() } }
    }

    /// The frame that the server receives for a request.
    fn redirect(&self, frame: Vec<u8>) -> Vec<u8> {
        let payload = &frame[MESSAGE_HEADER_LENGTH..];
        // A message that cannot be read is rejected by the server.
        let Some(service) = service_of(payload).filter(|service| !self.0.contains(service)) else { return frame };
        let Ok(mut request) = Request::parse_from_bytes(payload) else { return frame };
        request.method = format!("unknown service {service}: {}", request.method);
        request.service = PLACEHOLDER.to_owned();
        request.payload.clear();
        let Ok(payload) = request.write_to_bytes() else { return frame };
        let length = (payload.len() as u32).to_be_bytes();
        [&length[..], &frame[length.len()..MESSAGE_HEADER_LENGTH], &payload].concat()
    }
}

/// The name of a request's service, without a copy of the rest.
fn service_of(payload: &[u8]) -> Option<String> {
    let mut input = CodedInputStream::from_bytes(payload);
    let mut service = None;
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        if tag == SERVICE_TAG {
            service = Some(input.read_string().ok()?);
        } else {
            let wire_type = protobuf::rt::WireType::new(tag & 7)?;
            input.skip_field(wire_type).ok()?;
        }
    }
    service
}

impl Default for Known {
    fn default() -> Self {
        Self(Arc::new([]))
    }
}

/// A connection of a server; see [`Known`].
#[derive(Debug)]
pub struct Guarded<S> {
    inner: S,
    frames: Frames,
}

/// The bytes between the connection and the server.
#[derive(Debug, Default)]
struct Frames {
    known: Known,
    /// A header, or a request, that has not completely arrived.
    arriving: Vec<u8>,
    /// What the server has not read yet, and how much of it that it has.
    ready: Vec<u8>,
    read: usize,
    /// Bytes of the present frame that the server reads from the connection itself.
    pass: usize,
}

impl Frames {
    /// Not generic, so that it exists once.
    fn poll(
        &mut self,
        mut inner: Pin<&mut dyn AsyncRead>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        loop {
            if self.read < self.ready.len() {
                let part = &self.ready[self.read..];
                let part = &part[..part.len().min(buf.remaining())];
                buf.put_slice(part);
                self.read += part.len();
                return Poll::Ready(Ok(()));
            }
            if self.pass > 0 {
                let mut part = buf.take(self.pass);
                ready!(inner.as_mut().poll_read(cx, &mut part))?;
                let read = part.filled().len();
                // SAFETY: `part` is the unfilled rest of `buf`, whose first `read` bytes the inner reader has
                // initialised.
                unsafe { buf.assume_init(read) };
                buf.advance(read);
                self.pass -= read;
                return Poll::Ready(Ok(()));
            }
            let missing = self.missing();
            let mut chunk = [0; 4096];
            let size = missing.min(chunk.len());
            let mut part = ReadBuf::new(&mut chunk[..size]);
            ready!(inner.as_mut().poll_read(cx, &mut part))?;
            if part.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.arriving.extend_from_slice(part.filled());
            if part.filled().len() == missing {
                self.arrived();
            }
        }
    }

    /// Bytes until the header, or the request, is complete.
    fn missing(&self) -> usize {
        match self.arriving.len().checked_sub(MESSAGE_HEADER_LENGTH) {
            Some(payload) => self.length() - payload,
            None => MESSAGE_HEADER_LENGTH - self.arriving.len(),
        }
    }

    /// The length of the payload according to the header.
    fn length(&self) -> usize {
        self.arriving.first_chunk().map_or(0, |length| u32::from_be_bytes(*length) as usize)
    }

    /// Hands what has arrived to the server, unless it is the header of a request.
    fn arrived(&mut self) {
        let length = self.length();
        // The server discards a message that is too long.
        let is_request = self.arriving[TYPE] == MESSAGE_TYPE_REQUEST && length <= MESSAGE_LENGTH_MAX;
        let is_header = self.arriving.len() == MESSAGE_HEADER_LENGTH;
        if is_request && is_header && length > 0 {
            return;
        }
        let frame = std::mem::take(&mut self.arriving);
        self.pass = if is_header { length } else { 0 };
        self.ready = if is_header { frame } else { self.known.redirect(frame) };
        self.read = 0;
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        let inner: Pin<&mut S> = Pin::new(&mut this.inner);
        this.frames.poll(inner, cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let header = [&(payload.len() as u32).to_be_bytes()[..], &1u32.to_be_bytes(), &[kind, 0]].concat();
        [&header, payload].concat()
    }

    fn request(service: &str, payload: usize) -> Vec<u8> {
        let request = Request {
            service: service.into(),
            method: "Ping".into(),
            payload: vec![7; payload],
            timeout_nano: 5,
            ..Default::default()
        };
        frame(MESSAGE_TYPE_REQUEST, &request.write_to_bytes().unwrap())
    }

    async fn through(bytes: &[u8], step: usize) -> Vec<u8> {
        let mut services = HashMap::new();
        services.insert("a.Known".to_owned(), Service { methods: HashMap::new(), streams: HashMap::new() });
        let known = Known::of(&mut services);
        assert!(services.contains_key(PLACEHOLDER));
        let mut reader = tokio_test_reader(bytes, step, &known);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).await.unwrap();
        read
    }

    /// A connection on which `step` bytes at a time arrive.
    fn tokio_test_reader(bytes: &[u8], step: usize, known: &Known) -> impl AsyncRead + use<> {
        struct Steps(Vec<u8>, usize);
        impl AsyncRead for Steps {
            fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
                let size = self.1.min(self.0.len()).min(buf.remaining());
                let part: Vec<u8> = self.0.drain(..size).collect();
                buf.put_slice(&part);
                Poll::Ready(Ok(()))
            }
        }
        known.guard(Steps(bytes.to_vec(), step))
    }

    #[tokio::test]
    async fn only_requests_for_unknown_services_change() {
        let same = [
            request("a.Known", 0),
            request("a.Known", 100_000),
            frame(3, &[1, 2, 3]),
            frame(3, &[9; 50_000]),
            frame(MESSAGE_TYPE_REQUEST, &[]),
            // Not a request, and not complete: the server rejects it.
            frame(MESSAGE_TYPE_REQUEST, &[0xff, 0xff, 0xff]),
            frame(7, &[]),
        ];
        for step in [1, 9, 10, 4096, usize::MAX] {
            assert!(through(&same.concat(), step).await == same.concat(), "{step}");
        }
    }

    #[tokio::test]
    async fn a_request_for_an_unknown_service_names_it() {
        let all = [request("a.Known", 3), request("b.Sandbox", 5000), request("a.Known", 4)];
        let read = through(&all.concat(), 17).await;
        let middle = &read[all[0].len()..read.len() - all[2].len()];
        let (header, payload) = middle.split_at(MESSAGE_HEADER_LENGTH);
        assert_eq!(header[..4], (payload.len() as u32).to_be_bytes());
        assert_eq!(header[4..], all[1][4..MESSAGE_HEADER_LENGTH]);
        let request = Request::parse_from_bytes(payload).unwrap();
        assert_eq!((request.service.as_str(), request.timeout_nano), (PLACEHOLDER, 5));
        assert_eq!((request.method.as_str(), request.payload.len()), ("unknown service b.Sandbox: Ping", 0));
        assert!(read.ends_with(&all[2]));
    }
}
