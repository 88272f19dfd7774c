//! Accepts the clients of `ctl.sock`.

use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::ctl::connection;
use crate::ctl::limits::{Limits, SOCKET};
use crate::ctl::method::Method;
use crate::ctl::rpc;
use crate::ctl::rpc::RpcError;
use crate::host::socket;

/// Serves `methods` of `context` to every client, until the returned task is aborted or the runtime ends.
pub(crate) fn serve<C: Clone + Send + Sync>(
    listener: UnixListener,
    context: C,
    methods: &'static [Method<C>],
    limits: Limits,
) -> JoinHandle<()> {
    let turn_away = move |stream: &UnixStream| turn_away(stream, limits.clients);
    socket::serve(listener, SOCKET, limits.clients, turn_away, move |stream| {
        connection::serve(stream, context.clone(), methods, limits)
    })
}

fn turn_away(stream: &UnixStream, clients: usize) {
    let error = RpcError::new(rpc::BUSY, format!("{clients} clients are connected already: disconnect one of them"));
    // The buffer of a new socket has room for a line. A client that the line does not reach sees the connection close.
    let _ = stream.try_write(&rpc::response(&Value::Null, &Err(error)));
}
