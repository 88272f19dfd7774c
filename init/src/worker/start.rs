//! Start of an init: immediately, or with the hooks that accompany a start.

use std::io::Write;
use std::os::unix::net::UnixStream;

use libcontainer::container::ContainerStatus;
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::NOTIFY_FILE;
use oci_spec::runtime::Spec;

use super::hooks::StartOutcome;
use super::libcontainer::{call_error, load};
use crate::error::{CallError, FailureKind};
use crate::paths;

/// Starts an init whose spec has startContainer or poststart hooks, and waits for them.
pub(super) fn start(id: &str) -> Result<(), CallError> {
    let failed = |what: &str, e: &dyn std::error::Error| CallError::internal(format_args!("start {id}: {what}"), e);
    let bundle = paths::bundle(id);
    let outcome = StartOutcome::open(&bundle).map_err(|e| failed("open the FIFO of its hooks", &e))?;
    notify(id)?;
    if let Some(outcome) = outcome
        && let Some(reason) = outcome.wait().map_err(|e| failed("wait for its hooks", &e))?
    {
        return Err(CallError::new(FailureKind::Internal, format!("start {id}: {reason}")));
    }
    let spec = Spec::load(bundle.join("config.json")).map_err(|e| failed("read its spec", &e))?;
    let Some(poststart) = spec.hooks().as_ref().and_then(|hooks| hooks.poststart().as_ref()) else { return Ok(()) };
    let mut container = load(id)?;
    container.set_status(ContainerStatus::Running).save().map_err(|e| call_error("record", id, &e))?;
    run_hooks(Some(poststart), Some(&container.state), Some(&container.root), None, None)
        .map_err(|e| failed("hooks.poststart", &e))
}

/// Starts an init that waits on its start socket. Does the same as libcontainer's `Container::start`, but without a
/// worker.
pub(crate) fn notify(id: &str) -> Result<(), CallError> {
    let socket = paths::state(id).join(NOTIFY_FILE);
    // Neither call blocks: the listener's queue and the new connection are empty.
    UnixStream::connect(&socket).and_then(|mut stream| stream.write_all(b"start container")).map_err(|e| {
        let what = format!("start {id}: its init does not wait for the start: {e}");
        CallError::new(FailureKind::FailedPrecondition, what)
    })
}
