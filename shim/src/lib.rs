//! husk's host side: boots a virtual machine for each sandbox and relays containerd's calls to the guest.

pub mod annotations;
pub mod bootstrap;
pub mod cgroup;
pub mod config;
pub mod console;
pub mod container;
pub mod events;
pub mod guest;
pub mod hooks;
pub mod host;
pub mod io;
pub mod journal;
pub mod logging;
pub mod metadata;
pub mod prepare;
pub mod process;
pub mod rootfs;
pub mod rotate;
pub mod sandbox;
pub mod serve;
pub mod service;
pub mod state;
pub mod vm;
pub mod vsock;
