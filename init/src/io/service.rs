//! The Stdio service of one connection: finds the stream that it is for, and pumps.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::metered::Meter;
use husk_protos::stdio::{InputChunk, InputResponse, OutputChunk, OutputRequest, StreamKind};
use husk_protos::stdio_ttrpc::Stdio;
use tokio::time::timeout;
use ttrpc::r#async::{ServerStreamReceiver, ServerStreamSender, TtrpcContext};

use super::{Streams, input, output};
use crate::error::{Error, Kind};
use crate::serve::Gone;

/// Time that the first chunk of an input may take: it is sent together with the request.
const FIRST_CHUNK: Duration = Duration::from_secs(10);

/// Stdio for one connection.
pub struct Service {
    /// Where the processes' streams are.
    pub streams: Arc<Streams>,
    /// Of this connection.
    pub meter: Meter,
    /// Of this connection.
    pub gone: Gone,
}

#[async_trait]
impl Stdio for Service {
    async fn output(
        &self,
        _: &TtrpcContext,
        request: OutputRequest,
        stream: ServerStreamSender<OutputChunk>,
    ) -> ttrpc::Result<()> {
        let mut gone = self.gone.clone();
        let streams = tokio::select! {
            streams = self.streams.find(&request.container_id, &request.exec_id) => streams?,
            () = gone.wait() => return Ok(()),
        };
        let (slot, name) = match request.kind.enum_value() {
            Ok(StreamKind::STREAM_KIND_STDOUT) => (&streams.stdout, "stdout"),
            Ok(StreamKind::STREAM_KIND_STDERR) => (&streams.stderr, "stderr"),
            _ => return Err(Error::new(Kind::InvalidArgument, "kind must be stdout or stderr").into()),
        };
        let Some(fd) = slot.attach(name)? else { return Ok(()) };
        let source = if streams.terminal.is_some() { output::Source::Terminal } else { output::Source::Pipe };
        match output::pump(fd, source, streams.exited.subscribe(), &stream, &mut gone).await {
            output::End::Finished => {
                slot.detach(None);
                Ok(())
            }
            output::End::Broken(fd, error) => {
                slot.detach(Some(fd));
                Err(error.into())
            }
        }
    }

    async fn input(
        &self,
        _: &TtrpcContext,
        mut stream: ServerStreamReceiver<InputChunk>,
    ) -> ttrpc::Result<InputResponse> {
        let mut gone = self.gone.clone();
        let first = tokio::select! {
            first = timeout(FIRST_CHUNK, stream.recv()) => match first {
                Ok(Ok(Some(first))) => first,
                Ok(Ok(None)) => return Err(Error::new(Kind::InvalidArgument, "an input must name its process").into()),
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let what = format!("the first chunk did not come within {FIRST_CHUNK:?}");
                    return Err(Error::new(Kind::DeadlineExceeded, what).into());
                }
            },
            () = gone.wait() => return Ok(InputResponse::new()),
        };
        self.meter.consumed(&first);
        let streams = tokio::select! {
            streams = self.streams.find(&first.container_id, &first.exec_id) => streams?,
            () = gone.wait() => return Ok(InputResponse::new()),
        };
        let Some(fd) = streams.stdin.attach("stdin")? else { return Ok(InputResponse::new()) };
        match input::pump(fd, streams.exited.subscribe(), &mut stream, &self.meter, &mut gone).await {
            input::End::Finished(written) => {
                streams.stdin.detach(None);
                Ok(InputResponse { written, ..Default::default() })
            }
            input::End::Unread(written) => {
                streams.stdin.detach(None);
                input::discard(&mut stream, &self.meter, &mut gone).await;
                Ok(InputResponse { written, ..Default::default() })
            }
            input::End::Broken(fd, error) => {
                streams.stdin.detach(Some(fd));
                Err(error.into())
            }
        }
    }
}
