//! What is specific to containerd: how it starts a shim, where events go, and its log format.

pub mod bootstrap;
pub mod log;
pub mod publisher;
