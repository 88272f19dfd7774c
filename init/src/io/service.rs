//! The Stdio service of one connection: finds the requested stream and copies its data.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use husk_protos::metered::Meter;
use husk_protos::stdio::{InputChunk, InputResponse, OutputChunk, StreamKind, StreamRequest};
use husk_protos::stdio_ttrpc::Stdio;
use tokio::io::Interest;
use tokio::time::timeout;
use ttrpc::r#async::{ServerStreamReceiver, ServerStreamSender, TtrpcContext};

use super::{Streams, input, output};
use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};

/// Time for the first chunk of an input to arrive. Clients send it together with the request.
const FIRST_CHUNK: Duration = Duration::from_secs(10);

pub(crate) struct StdioService {
    pub(crate) streams: Arc<Streams>,
    /// Of the service's connection.
    pub(crate) meter: Meter,
    /// Of the service's connection.
    pub(crate) disconnect: Disconnect,
}

#[async_trait]
impl Stdio for StdioService {
    async fn output(
        &self,
        _: &TtrpcContext,
        request: StreamRequest,
        stream: ServerStreamSender<OutputChunk>,
    ) -> ttrpc::Result<()> {
        let mut disconnect = self.disconnect.clone();
        let streams = tokio::select! {
            streams = self.streams.find(&request.container_id, &request.exec_id) => streams?,
            () = disconnect.wait() => return Ok(()),
        };
        let (slot, name) = match request.kind.enum_value() {
            Ok(StreamKind::STREAM_KIND_STDOUT) => (&streams.stdout, "stdout"),
            Ok(StreamKind::STREAM_KIND_STDERR) => (&streams.stderr, "stderr"),
            _ => return Err(CallError::new(FailureKind::InvalidArgument, "kind must be stdout or stderr").into()),
        };
        let Some(client) = slot.attach(name, Interest::READABLE)? else { return Ok(()) };
        output::pump(&client, streams.exited.subscribe(), &stream, &mut disconnect).await?;
        client.end();
        Ok(())
    }

    async fn input(
        &self,
        _: &TtrpcContext,
        mut stream: ServerStreamReceiver<InputChunk>,
    ) -> ttrpc::Result<InputResponse> {
        let mut disconnect = self.disconnect.clone();
        let first = tokio::select! {
            first = timeout(FIRST_CHUNK, stream.recv()) => match first {
                Ok(Ok(Some(first))) => first,
                Ok(Ok(None)) => {
                    let what = "the first chunk must name the process";
                    return Err(CallError::new(FailureKind::InvalidArgument, what).into());
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let what = format!("the first chunk did not arrive within {FIRST_CHUNK:?}");
                    return Err(CallError::new(FailureKind::DeadlineExceeded, what).into());
                }
            },
            () = disconnect.wait() => return Ok(InputResponse::new()),
        };
        self.meter.consumed(&first);
        let streams = tokio::select! {
            streams = self.streams.find(&first.container_id, &first.exec_id) => streams?,
            () = disconnect.wait() => return Ok(InputResponse::new()),
        };
        let Some(process) = streams.stdin.attach("stdin", Interest::WRITABLE)? else {
            return Ok(InputResponse::new());
        };
        match input::pump(&process, streams.exited.subscribe(), &mut stream, &self.meter, &mut disconnect).await {
            input::InputEnd::Finished(written) => {
                process.end();
                Ok(InputResponse { written, ..Default::default() })
            }
            input::InputEnd::Unread(written) => {
                process.end();
                input::discard(&mut stream, &self.meter, &mut disconnect).await;
                Ok(InputResponse { written, ..Default::default() })
            }
            input::InputEnd::Broken(error) => Err(error.into()),
        }
    }
}
