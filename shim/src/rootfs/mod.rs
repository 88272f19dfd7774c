//! A container's files: rewrites its spec for the guest ([`spec`]), and builds the folder that virtiofsd serves to the
//! guest ([`share`]) with mounts that are complete before the guest sees them ([`mount`]). [`plan`] decides what
//! containerd's mounts for the root mean. [`socket`] decides which Unix
//! sockets of the host a spec may mount. [`direct`] finds volumes that the guest mounts from block devices.

pub(crate) mod direct;
mod mapped;
pub(crate) mod mount;
pub(crate) mod plan;
pub(crate) mod share;
pub(crate) mod socket;
pub(crate) mod spec;
