//! husk's host side: boots a virtual machine for each sandbox and relays containerd's calls to the guest.

pub mod config;
pub mod console;
pub mod containerd;
pub mod ctl;
pub mod extras;
pub mod guest;
pub mod host;
pub mod metadata;
pub mod network;
pub mod prepare;
pub mod rootfs;
pub mod sandbox;
pub mod serve;
pub mod state;
pub mod stdio;
pub mod task_service;
pub mod vm;
pub mod vmm;
