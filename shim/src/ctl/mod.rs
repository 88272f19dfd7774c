//! `ctl.sock`: the socket on which a sandbox answers an operator's tool, one JSON-RPC 2.0 message a line (see [`rpc`]).
//!
//! A connection runs one call at a time. A unary method returns its result at once. A streaming method sends
//! notifications under its own name before the response, and receives the notifications that the client sends
//! meanwhile; a request meanwhile is rejected as busy. Lines, queues, clients and waits are bounded, so that a client
//! can hold up nobody but itself.
//!
//! | file | content |
//! |---|---|
//! | `server`, `connection`, `limits` | the clients |
//! | `rpc` | the messages of JSON-RPC |
//! | `method`, `methods` | what a method is, and all of them |
//! | `messages` | parameters, notifications and results, shared with `husk` |
//! | `events`, `logs`, `exec` | the streaming methods |
//!
//! To add a method, add its entry to [`methods::METHODS`] and write the function that the entry names, in a file of its
//! own:
//!
//! ```ignore
//! Method {
//!     name: "compute.vm.echo",
//!     summary: "Repeats the text that it receives",
//!     params: &[Param { name: "text", kind: "string", required: true, summary: "the first text" }],
//!     result: "{} when the client closes its side",
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
//! `Kind::Unary(|sandbox, params| Box::pin(...))` has no `Call`, and a deadline. An error has one of the codes in
//! [`rpc`]. `rpc.discover` needs nothing but the entry.

mod connection;
mod events;
mod exec;
mod limits;
mod logs;
pub mod messages;
mod method;
pub(crate) mod methods;
pub mod rpc;
mod server;
#[cfg(test)]
mod tests;

pub(crate) use limits::Limits;
pub use limits::SOCKET;
pub(crate) use server::serve;
