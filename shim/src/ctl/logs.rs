//! `logs`: what the guest has written to its console, and its init to its log; and what they write.

use std::io;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::console::lines::Lines;
use crate::console::{LogChain, Record};
use crate::ctl::method::Gone;
use crate::ctl::{Answer, Call, RpcError, rpc};
use crate::sandbox::Sandbox;

/// Bytes that are sent at once: far below a line's limit, whatever JSON makes of them.
const PIECE: usize = 32 * 1024;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Params {
    source: Option<Which>,
    lines: Option<usize>,
    follow: bool,
}

#[derive(Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Which {
    Console,
    Init,
}

/// One of the two, and how far it has been sent.
struct Source {
    name: &'static str,
    record: Record,
    at: u64,
    lines: Lines,
}

/// Sends the lines, those of the console first; with `follow`, those that come too, until the client sends no more or the sandbox has ended.
pub async fn run(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let params: Params = rpc::params(std::mem::take(&mut call.params))?;
    let all = [
        (Which::Console, "console", sandbox.guest_logs().console.record().clone()),
        (Which::Init, "init", sandbox.guest_logs().init.clone()),
    ];
    let mut sources = Vec::new();
    for (which, name, record) in all {
        if params.source.is_none_or(|wanted| wanted == which) {
            let mut source = Source { name, record, at: 0, lines: Lines::default() };
            source.send_what_is_there(&call, params.lines).await?;
            sources.push(source);
        }
    }
    let mut ended = false;
    while params.follow && !ended {
        let mut sent = false;
        for source in &mut sources {
            sent |= source.send_what_has_come(&call).await?;
        }
        if sent {
            continue;
        }
        let grown = sources.iter().map(|source| Box::pin(source.record.grown(source.at)));
        tokio::select! {
            _ = futures::future::select_all(grown) => {}
            () = sandbox.ended() => ended = true,
            note = call.note() => if note.is_none() { break },
        }
    }
    for source in &mut sources {
        let last = source.lines.end();
        source.send(&call, last.into_iter().collect()).await?;
    }
    Ok(json!({"ended": ended}))
}

impl Source {
    async fn send_what_is_there(&mut self, call: &Call, lines: Option<usize>) -> Result<(), RpcError> {
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

    /// False if nothing has.
    async fn send_what_has_come(&mut self, call: &Call) -> Result<bool, Gone> {
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
                call.notify(&json!({"source": self.name, "missed": overrun.missed})).await?;
                Ok(true)
            }
        }
    }

    async fn send(&self, call: &Call, lines: Vec<String>) -> Result<(), Gone> {
        if lines.is_empty() {
            return Ok(());
        }
        let told: Value = json!({"source": self.name, "lines": lines});
        call.notify(&told).await
    }
}

/// On a thread for it: there may be a lot to be read, and other calls wait for this one.
async fn blocking<T: Send + 'static>(
    chain: LogChain,
    work: impl FnOnce(&LogChain) -> io::Result<T> + Send + 'static,
) -> io::Result<(LogChain, T)> {
    let worked = tokio::task::spawn_blocking(move || work(&chain).map(|done| (chain, done))).await;
    worked.map_err(io::Error::other)?
}
