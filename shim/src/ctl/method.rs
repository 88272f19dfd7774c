//! What a method is: its name and description, which `rpc.discover` returns, and the function that runs when it is
//! called.

use futures::future::BoxFuture;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;

/// The prefix of all methods of a VM, which a caller may omit.
pub(super) const PREFIX: &str = "compute.vm.";
/// The method that describes the others.
pub(super) const DISCOVER: &str = "rpc.discover";

/// The result of a call, or its error.
pub(crate) type Answer = Result<Value, RpcError>;
/// A running call.
pub(crate) type Running = BoxFuture<'static, Answer>;

/// A parameter of a method.
pub(crate) struct Param {
    pub name: &'static str,
    /// The name of its type in JSON schema.
    pub kind: &'static str,
    /// A call without it is rejected.
    pub required: bool,
    /// A description.
    pub summary: &'static str,
}

/// A method whose context is a `C`.
pub(crate) struct Method<C: 'static> {
    /// With [`PREFIX`].
    pub name: &'static str,
    /// A description.
    pub summary: &'static str,
    /// Every parameter.
    pub params: &'static [Param],
    /// A description of the result.
    pub result: &'static str,
    /// Its implementation.
    pub kind: Kind<C>,
}

/// The implementation of a method.
pub(crate) enum Kind<C: 'static> {
    /// Returns its result at once.
    Unary(fn(C, Value) -> Running),
    /// Sends notifications before its response, and may receive some.
    Streaming {
        /// A description of the notifications in both directions.
        notifications: &'static str,
        run: fn(C, Call) -> Running,
    },
    /// Always refused, with this message: who does it instead, and how.
    Refused(&'static str),
}

/// The method with this name.
pub(super) fn find<C>(methods: &'static [Method<C>], name: &str) -> Option<&'static Method<C>> {
    methods.iter().find(|method| method.name == name || method.name.strip_prefix(PREFIX) == Some(name))
}

/// A notification from the client, for the streaming call on its connection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Note {
    /// Without [`PREFIX`].
    pub method: String,
    /// An object.
    pub params: Value,
}

/// The client has disconnected, or reads too slowly.
#[derive(Debug, thiserror::Error)]
#[error("the client has disconnected or has stopped reading")]
pub(super) struct Gone;

impl From<Gone> for RpcError {
    fn from(gone: Gone) -> Self {
        // Nobody reads it.
        Self::internal(gone.to_string())
    }
}

/// A streaming call. It is dropped at its current await point when its connection breaks.
pub(crate) struct Call {
    /// An object; see [`rpc::params`].
    pub params: Value,
    pub(super) method: &'static str,
    pub(super) lines: mpsc::Sender<Vec<u8>>,
    pub(super) notes: mpsc::Receiver<Note>,
}

impl Call {
    /// Sends a notification. Waits while the client is slow, but not forever. Keep a notification far below the limit
    /// of a line.
    ///
    /// # Errors
    /// [`Gone`]: the call should end.
    pub(super) async fn notify(&self, params: &impl Serialize) -> Result<(), Gone> {
        self.lines.send(rpc::notification(self.method, params)).await.map_err(|_| Gone)
    }

    /// The next notification from the client; `None` when the client has closed its side. It may still read, but a call
    /// that follows something ends here, because nothing else shows that the client is gone. Cancel safe.
    pub(super) async fn note(&mut self) -> Option<Note> {
        self.notes.recv().await
    }
}

/// The methods as an OpenRPC document (spec.open-rpc.org), whose extensions begin with `x-`.
pub(super) fn discover<C>(title: &str, methods: &[Method<C>]) -> Value {
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
            Kind::Refused(message) => {
                entry["x-always-refused"] = json!(true);
                entry["errors"] = json!([{"code": rpc::REFUSED, "message": message}]);
            }
        }
        entry
    });
    let discover = json!({
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
        "methods": described.chain([discover]).collect::<Vec<_>>(),
    })
}
