//! `compute.vm.events.tail`: the sandbox's latest events, and on request the following ones.

use std::sync::Arc;

use crate::ctl::messages::{Event, EventsEnd, EventsParams, EventsPart};
use crate::ctl::method::{Answer, Call};
use crate::ctl::rpc;
use crate::sandbox::Sandbox;

/// Events in one notification: far below a line's limit, however long they are.
const BATCH: usize = 32;

/// Sends the events after number `after`. With `follow`, sends future events until the client closes its side or the
/// sandbox ends.
pub(super) async fn tail(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let EventsParams { mut after, follow } = rpc::params(std::mem::take(&mut call.params))?;
    let recent = sandbox.recent().clone();
    let mut ended = false;
    loop {
        let events = recent.after(after, BATCH);
        if let (Some(first), Some(last)) = (events.first(), events.last()) {
            let forgotten = first.number - 1 - after.min(first.number - 1);
            after = last.number;
            call.notify(&EventsPart { events: events.into_iter().map(Event::from).collect(), forgotten }).await?;
            continue;
        }
        if !follow || ended {
            return rpc::result(EventsEnd { last: after, ended });
        }
        tokio::select! {
            () = recent.grown(after) => {}
            () = sandbox.ended() => ended = true,
            note = call.note() => if note.is_none() { return rpc::result(EventsEnd { last: after, ended: false }) },
        }
    }
}
