//! The guest as the shim reaches it: the vsock link, the clients of its services, and its reports.

pub(crate) mod client;
pub(crate) mod link;
pub(crate) mod network;
pub(crate) mod report;
