//! husk's host side: boots a virtual machine for each sandbox and relays containerd's calls to the guest.

pub mod cgroup;
pub mod process;
pub mod state;
