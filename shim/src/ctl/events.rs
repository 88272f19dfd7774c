//! `events.tail`: what has happened to the sandbox lately, and what happens.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;

use crate::ctl::{Answer, Call, rpc};
use crate::sandbox::Sandbox;

/// Events of one notification: far below a line's limit, however long they are.
const AT_ONCE: usize = 32;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct Params {
    after: u64,
    follow: bool,
}

/// Sends the events after `after`; with `follow`, those that come too, until the client sends no more or the sandbox has ended.
pub async fn tail(sandbox: Arc<Sandbox>, mut call: Call) -> Answer {
    let Params { mut after, follow } = rpc::params(std::mem::take(&mut call.params))?;
    let recent = sandbox.recent().clone();
    let mut ended = false;
    loop {
        let events = recent.after(after, AT_ONCE);
        if let (Some(first), Some(last)) = (events.first(), events.last()) {
            let forgotten = first.number - 1 - after.min(first.number - 1);
            after = last.number;
            call.notify(&json!({"events": events, "forgotten": forgotten})).await?;
            continue;
        }
        if !follow || ended {
            return Ok(json!({"last": after, "ended": ended}));
        }
        tokio::select! {
            () = recent.grown(after) => {}
            () = sandbox.ended() => ended = true,
            note = call.note() => if note.is_none() { return Ok(json!({"last": after, "ended": false})) },
        }
    }
}
