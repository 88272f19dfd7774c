//! One sandbox: its VM and its containers.

mod boot;
pub(crate) mod container;
mod control;
mod cpuset;
mod create;
mod end;
mod error;
mod events;
mod holder;
mod hooks;
mod network;
mod registry;
mod start;
mod status;
mod without_guest;

pub(crate) use error::SandboxError;
pub(crate) use registry::Sandbox;
pub(crate) use status::StatusError;
