//! Start of an init that waits: at once, or with the hooks that go with it.

use std::io::Write;
use std::os::unix::net::UnixStream;

use libcontainer::container::ContainerStatus;
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::NOTIFY_FILE;
use oci_spec::runtime::Spec;

use super::hooks::Outcome;
use super::serve::{explain, load};
use crate::error::{Error, Kind};
use crate::places;

/// Starts an init whose spec has hooks for it, and waits for those.
pub fn start(id: &str) -> Result<(), Error> {
    let failed = |what: &str, e: &dyn std::error::Error| Error::internal(format_args!("start {id}: {what}"), e);
    let bundle = places::bundle(id);
    let outcome = Outcome::of(&bundle).map_err(|e| failed("open the fifo of its hooks", &e))?;
    notify(id)?;
    if let Some(outcome) = outcome
        && let Some(why) = outcome.wait().map_err(|e| failed("wait for its hooks", &e))?
    {
        return Err(Error::new(Kind::Internal, format!("start {id}: {why}")));
    }
    let spec = Spec::load(bundle.join("config.json")).map_err(|e| failed("read its spec", &e))?;
    let Some(poststart) = spec.hooks().as_ref().and_then(|hooks| hooks.poststart().as_ref()) else { return Ok(()) };
    let mut container = load(id)?;
    container.set_status(ContainerStatus::Running).save().map_err(|e| explain("record", id, &e))?;
    run_hooks(Some(poststart), Some(&container.state), Some(&container.root), None, None)
        .map_err(|e| failed("hooks.poststart", &e))
}

/// Lets an init go on that waits on its start socket: what libcontainer's `Container::start` does, without a process for it.
pub fn notify(id: &str) -> Result<(), Error> {
    let socket = places::state(id).join(NOTIFY_FILE);
    // Neither blocks: the listener's queue is empty, and so is the new connection.
    UnixStream::connect(&socket)
        .and_then(|mut stream| stream.write_all(b"start container"))
        .map_err(|e| Error::new(Kind::FailedPrecondition, format!("start {id}: its init does not wait for it: {e}")))
}
