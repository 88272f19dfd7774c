//! The guest as the shim reaches it: the link, the clients of its services, and its reports.

pub mod client;
pub mod link;
pub mod report;
