//! What a method is: its name and description, which `rpc.discover` tells, and what runs when it is called.

use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;

/// All methods of a VM have it, and a caller may leave it out.
pub const PREFIX: &str = "compute.vm.";
/// Describes the others.
pub const DISCOVER: &str = "rpc.discover";

/// What a call comes to.
pub type Answer = Result<Value, RpcError>;
/// A call that is under way.
pub type Running = BoxFuture<'static, Answer>;

/// A parameter, by name.
pub struct Param {
    /// Its name.
    pub name: &'static str,
    /// JSON schema's word for its type.
    pub kind: &'static str,
    /// Whether a call without it is refused.
    pub required: bool,
    /// For people.
    pub summary: &'static str,
}

/// A method of the sockets that serve a `C`.
pub struct Method<C: 'static> {
    /// With [`PREFIX`].
    pub name: &'static str,
    /// For people.
    pub summary: &'static str,
    /// All that it takes.
    pub params: &'static [Param],
    /// For people: what its result is.
    pub result: &'static str,
    /// What it does.
    pub kind: Kind<C>,
}

/// What a method does.
pub enum Kind<C: 'static> {
    /// Answers at once.
    Unary(fn(C, Value) -> Running),
    /// Sends notifications before its answer, and may be sent some.
    Streaming {
        /// For people: what is in the notifications, and which ones may be sent to it.
        notifications: &'static str,
        /// Runs it.
        run: fn(C, Call) -> Running,
    },
    /// Is refused with these words: who does it, and how.
    Elsewhere(&'static str),
}

/// The method of that name.
pub fn find<C>(methods: &'static [Method<C>], name: &str) -> Option<&'static Method<C>> {
    methods.iter().find(|method| method.name == name || method.name.strip_prefix(PREFIX) == Some(name))
}

/// A notification of the client's, for the streaming call that runs on its connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// Without [`PREFIX`].
    pub method: String,
    /// An object.
    pub params: Value,
}

/// The client does not take anything any more: it has gone, or was too slow.
#[derive(Debug, thiserror::Error)]
#[error("the client has gone, or has not read for too long")]
pub struct Gone;

impl From<Gone> for RpcError {
    fn from(gone: Gone) -> Self {
        // Written to nobody.
        Self::internal(gone)
    }
}

/// A streaming call. It is dropped where it waits when its connection breaks.
pub struct Call {
    /// An object; see [`rpc::params`].
    pub params: Value,
    pub(super) method: &'static str,
    pub(super) lines: mpsc::Sender<Vec<u8>>,
    pub(super) notes: mpsc::Receiver<Note>,
}

impl Call {
    /// Sends a notification; waits while the client is slow, but not for ever. Keep it far below a line's limit.
    ///
    /// # Errors
    /// When the client has gone or was too slow: time to end.
    pub async fn notify(&self, params: &Value) -> Result<(), Gone> {
        self.lines.send(rpc::notification(self.method, params)).await.map_err(|_| Gone)
    }

    /// The next notification of the client's; none when it sends no more. It may still be reading, but one that only follows something ends
    /// with that, because nothing else tells that nobody is there. May be dropped while it waits.
    pub async fn note(&mut self) -> Option<Note> {
        self.notes.recv().await
    }
}

/// What there is, as an OpenRPC document (spec.open-rpc.org), whose extensions are `x-`.
pub fn discover<C>(title: &str, methods: &[Method<C>]) -> Value {
    let described = methods.iter().map(|method| {
        let params = method.params.iter().map(|param| {
            json!({
                "name": param.name,
                "required": param.required,
                "summary": param.summary,
                "schema": {"type": param.kind},
            })
        });
        let mut entry = json!({
            "name": method.name,
            "summary": method.summary,
            "paramStructure": "by-name",
            "params": params.collect::<Vec<_>>(),
            "result": {"name": "result", "summary": method.result, "schema": {"type": "object"}},
        });
        match &method.kind {
            Kind::Unary(_) => {}
            Kind::Streaming { notifications, .. } => {
                entry["x-streaming"] = json!(true);
                entry["x-notifications"] = json!(notifications);
            }
            Kind::Elsewhere(words) => {
                entry["x-always-refused"] = json!(true);
                entry["errors"] = json!([{"code": rpc::REFUSED, "message": words}]);
            }
        }
        entry
    });
    let itself = json!({
        "name": DISCOVER,
        "summary": "This document",
        "paramStructure": "by-name",
        "params": [],
        "result": {"name": "result", "summary": "an OpenRPC document", "schema": {"type": "object"}},
    });
    json!({
        "openrpc": "1.2.6",
        "info": {"title": title, "version": env!("CARGO_PKG_VERSION")},
        "x-prefix": PREFIX,
        "methods": described.chain([itself]).collect::<Vec<_>>(),
    })
}
