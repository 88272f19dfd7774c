//! `compute.vm.logs`: the guest's console and its init's log, and on request their future lines.

use std::io;
use std::sync::Arc;

use crate::console::lines::Lines;
use crate::console::{LogChain, Record};
use crate::ctl::messages::{LogSource, LogsEnd, LogsParams, LogsPart};
use crate::ctl::method::{Answer, Call, Gone};
use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;
use crate::sandbox::Sandbox;

/// Bytes of a log in one notification: far below a line's limit, even with every byte escaped.
const PIECE: usize = 32 * 1024;

/// A log, and how far it has been sent.
struct Reader {
    source: LogSource,
    record: Record,
    at: u64,
    lines: Lines,
}

/// Sends the lines of the console, then those of the init. With `follow`, sends future lines until the client closes
/// its side or the sandbox ends.
pub(super) async fn run(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let params: LogsParams = rpc::params(std::mem::take(&mut call.params))?;
    let mut readers = Vec::new();
    for source in LogSource::ALL.into_iter().filter(|source| params.source.is_none_or(|only| only == *source)) {
        let record = match source {
            LogSource::Console => sandbox.guest_logs().console.record().clone(),
            LogSource::Init => sandbox.guest_logs().init.clone(),
        };
        let mut reader = Reader { source, record, at: 0, lines: Lines::default() };
        reader.send_past(&call, params.lines).await?;
        readers.push(reader);
    }
    let mut ended = false;
    while params.follow && !ended {
        let mut sent = false;
        for reader in &mut readers {
            sent |= reader.send_new(&call).await?;
        }
        if sent {
            continue;
        }
        let grown = readers.iter().map(|reader| Box::pin(reader.record.grown(reader.at)));
        tokio::select! {
            _ = futures::future::select_all(grown) => {}
            () = sandbox.ended() => ended = true,
            note = call.note() => if note.is_none() { break },
        }
    }
    for reader in &mut readers {
        let last = reader.lines.end();
        reader.send(&call, last.into_iter().collect()).await?;
    }
    rpc::result(LogsEnd { ended })
}

impl Reader {
    /// Sends what is on disk; with `lines`, only the last lines of it.
    async fn send_past(&mut self, call: &Call, lines: Option<usize>) -> Result<(), RpcError> {
        let path = self.record.path().display().to_string();
        let failed = |error: io::Error| RpcError::internal(format!("read {path}: {error}"));
        let (chain, end) = self.record.on_disk().map_err(failed)?;
        self.at = end;
        let (chain, mut offset) =
            blocking(chain, move |chain| lines.map_or(Ok(0), |lines| chain.last_lines(lines))).await.map_err(failed)?;
        let mut chain = Some(chain);
        while let Some(next) = chain.take() {
            let read = move |chain: &LogChain| {
                let mut piece = vec![0; PIECE];
                let length = chain.read_at(offset, &mut piece)?;
                piece.truncate(length);
                Ok(piece)
            };
            let (next, piece) = blocking(next, read).await.map_err(failed)?;
            if !piece.is_empty() {
                offset += piece.len() as u64;
                chain = Some(next);
                let lines = self.lines.take(&piece);
                self.send(call, lines).await?;
            }
        }
        Ok(())
    }

    /// Sends what was written since; false if nothing was.
    async fn send_new(&mut self, call: &Call) -> Result<bool, Gone> {
        match self.record.read(self.at, PIECE) {
            Ok(piece) if piece.is_empty() => Ok(false),
            Ok(piece) => {
                self.at += piece.len() as u64;
                let lines = self.lines.take(&piece);
                self.send(call, lines).await?;
                Ok(true)
            }
            Err(overrun) => {
                self.at += overrun.missed;
                let gap = LogsPart { source: self.source, lines: Vec::new(), missed: Some(overrun.missed) };
                call.notify(&gap).await?;
                Ok(true)
            }
        }
    }

    async fn send(&self, call: &Call, lines: Vec<String>) -> Result<(), Gone> {
        if lines.is_empty() {
            return Ok(());
        }
        call.notify(&LogsPart { source: self.source, lines, missed: None }).await
    }
}

/// Runs `work` on a blocking thread: a log can be long, and the runtime's one thread serves all calls.
async fn blocking<T: Send + 'static>(
    chain: LogChain,
    work: impl FnOnce(&LogChain) -> io::Result<T> + Send + 'static,
) -> io::Result<(LogChain, T)> {
    let worked = tokio::task::spawn_blocking(move || work(&chain).map(|done| (chain, done))).await;
    worked.map_err(io::Error::other)?
}
