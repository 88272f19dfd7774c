//! A running VM: its boot, its virtiofsd, and its cgroup.

pub mod boot;
pub mod cgroup;
pub mod virtiofsd;
