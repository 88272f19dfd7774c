//! The guest as the shim reaches it: the vsock link, the clients of its services, its reports, and its
//! clock.

pub(crate) mod client;
pub(crate) mod clock;
pub(crate) mod link;
pub(crate) mod network;
pub(crate) mod replies;
pub(crate) mod report;
mod silence;
