//! The host's operating system: processes, children, hooks, and sockets. Knows nothing of VMs.

pub mod child;
pub mod hooks;
pub mod process;
pub mod socket;
