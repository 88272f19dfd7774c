//! What a VM's NICs are connected to, as plain data for operators.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A VM's NICs and the links of its network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStatus {
    /// The path of the network namespace.
    pub netns: PathBuf,
    /// The NICs, in the order in which the machine has them.
    pub nics: Vec<NicStatus>,
    /// Why the guest's network differs from the namespace's; empty if it does not.
    pub problems: Vec<String>,
}

/// A NIC of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NicStatus {
    /// The MAC that the machine gave it, which identifies it in the guest.
    pub nic: String,
    /// The name of its tap in the namespace.
    pub tap: String,
    /// The link that it is connected to; `None` for a spare NIC.
    pub link: Option<LinkStatus>,
}

/// A link of the namespace that a NIC is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkStatus {
    /// Its name, in the namespace and in the guest.
    pub name: String,
    /// Its index in the namespace.
    pub index: u32,
    /// Its MAC, which the NIC has in the guest.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}
