//! One sandbox: its VM and its containers.

mod api;
mod boot;
pub(crate) mod container;
mod control;
mod cpuset;
mod create;
mod disks;
mod end;
mod error;
pub(crate) mod events;
mod files;
mod holder;
mod hooks;
mod limits;
mod managed;
mod network;
mod oom;
mod registry;
pub(crate) mod rehearsal;
mod requested_disks;
mod resize;
mod roots;
mod share;
pub(crate) mod spare;
mod start;
mod status;
mod thread;
mod volumes;
mod waited;
mod watch;
mod without_guest;

pub(crate) use disks::DiskError;
pub(crate) use error::SandboxError;
pub(crate) use registry::Sandbox;
pub(crate) use status::StatusError;
