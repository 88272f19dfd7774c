//! `ctl.sock`: what an operator's tool asks of a sandbox, one JSON-RPC 2.0 message a line (see [`rpc`]).
//!
//! A connection does one call after the other. A method answers at once, or is streaming: then notifications with its name come before the
//! response, and notifications of the client's that come meanwhile go to it; a request meanwhile is refused as busy. Nothing that a client does
//! holds up anybody but itself: lines, queues, clients and waits are bounded.
//!
//! To add a method, add its entry to [`methods::METHODS`] and write the function that it names, in a file of its own:
//!
//! ```ignore
//! Method {
//!     name: "compute.vm.echo",
//!     summary: "Repeats what it is sent",
//!     params: &[Param { name: "text", kind: "string", required: true, summary: "what to begin with" }],
//!     result: "{} when the client sends no more",
//!     kind: Kind::Streaming {
//!         notifications: "{text}; takes `echo.input` {text}",
//!         run: |sandbox, call| Box::pin(echo::run(sandbox, call)),
//!     },
//! },
//!
//! #[derive(serde::Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct Params { text: String }
//!
//! pub async fn run(_: Arc<Sandbox>, mut call: Call) -> Answer {
//!     let Params { text } = rpc::params(std::mem::take(&mut call.params))?;
//!     call.notify(&json!({"text": text})).await?;
//!     while let Some(note) = call.note().await {
//!         match note.method.as_str() {
//!             "echo.input" => call.notify(&note.params).await?,
//!             _ => {}
//!         }
//!     }
//!     Ok(json!({}))
//! }
//! ```
//!
//! `Kind::Unary(|sandbox, params| Box::pin(...))` has no `Call`, and a deadline. An error's code is one of [`rpc`]'s; `rpc.discover` needs no more
//! than the entry.

use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

mod connection;
mod events;
pub mod exec;
mod logs;
pub mod method;
pub mod methods;
pub mod rpc;
#[cfg(test)]
mod tests;

use crate::host::socket;
pub use method::{Answer, Call, Kind, Method, Note, Param};
pub use rpc::RpcError;

/// The socket's name in the sandbox's folder.
pub const SOCKET: &str = "ctl.sock";

/// What a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a line, its end not counted.
    pub line: usize,
    /// Clients at once.
    pub clients: usize,
    /// Without a call, between two of a client's lines.
    pub idle: Duration,
    /// For a method that answers at once.
    pub answer: Duration,
    /// For a line to be taken by the client. Long: a terminal that was stopped by its user, or a pager, is no reason to end.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            line: 1 << 20,
            clients: 64,
            idle: Duration::from_secs(60),
            answer: Duration::from_secs(10),
            stall: Duration::from_secs(300),
        }
    }
}

/// Serves `methods` of `context` to whoever connects, until the returned task is aborted or the runtime ends.
pub fn serve<C: Clone + Send + Sync>(
    listener: UnixListener,
    context: C,
    methods: &'static [Method<C>],
    limits: Limits,
) -> tokio::task::JoinHandle<()> {
    let turn_away = move |stream: &UnixStream| turn_away(stream, limits.clients);
    socket::serve(listener, SOCKET, limits.clients, turn_away, move |stream| {
        connection::serve(stream, context.clone(), methods, limits)
    })
}

fn turn_away(stream: &UnixStream, clients: usize) {
    let error = RpcError::new(rpc::BUSY, format!("{clients} clients are connected already: end one of them"));
    // A new socket has room for a line; a client that it does not reach sees the end of the connection.
    let _ = stream.try_write(&rpc::response(&serde_json::Value::Null, &Err(error)));
}
