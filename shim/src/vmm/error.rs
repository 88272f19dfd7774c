//! Why a machine does not start, whichever VMM runs it.

use std::io;
use std::path::PathBuf;

use crate::host::child::LaunchError;
use crate::host::digest::Sha256Digest;
use crate::vmm::hugepages::HugePagesError;

/// A file is not the one that the configuration names by its digest.
#[derive(Debug, thiserror::Error)]
#[error("the {what} {} has the SHA-256 digest {found}, but {what}_sha256 is {expected}", path.display())]
pub struct WrongDigest {
    /// The file's role: kernel or initrd.
    pub(crate) what: &'static str,
    /// Its path.
    pub(crate) path: PathBuf,
    /// The configured digest.
    pub(crate) expected: Sha256Digest,
    /// The file's digest.
    pub(crate) found: Sha256Digest,
}

/// Why a machine does not start.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// A file that the machine needs cannot be opened.
    #[error("open {what} {}", path.display())]
    Open {
        /// The file's role: kernel, initrd or disk.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file is not the one that the configuration names by its digest.
    #[error(transparent)]
    Digest(#[from] Box<WrongDigest>),
    /// The host lacks free huge pages.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
    /// The VMM's process cannot be started.
    #[error("start {}", program.display())]
    Spawn {
        /// The VMM's program.
        program: PathBuf,
        /// The failed step.
        source: LaunchError,
    },
    /// A system call failed.
    #[error("{what}")]
    System {
        /// The attempted operation.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// A running machine has as many more network cards as it can be given.
    #[error("the machine has no slot left for a network card")]
    NoSlot,
    /// The machine was started without a controller for disks.
    #[error("the machine was started without a controller for disks")]
    NoController,
    /// A running machine has as many disks as it can have.
    #[error("the machine has no number left for a disk")]
    NoNumber,
    /// A running machine cannot be given a disk, or keeps one.
    #[error("{what} {machine}")]
    Disk {
        /// The attempted operation, with a preposition.
        what: &'static str,
        /// The VMM.
        machine: &'static str,
        /// The VMM's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A running machine does not say which threads execute its virtual CPUs.
    #[error("query the virtual CPUs of {machine}")]
    Vcpus {
        /// The VMM.
        machine: &'static str,
        /// The VMM's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine's memory is fixed.
    #[error("{machine} cannot give this machine more memory")]
    FixedMemory {
        /// The VMM.
        machine: &'static str,
    },
    /// A running machine's memory cannot be changed or queried.
    #[error("{what} of {machine}")]
    Memory {
        /// The attempted operation.
        what: &'static str,
        /// The VMM.
        machine: &'static str,
        /// The VMM's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine has no balloon.
    #[error("the machine has no balloon: its network cards have taken the last slot")]
    NoBalloon,
    /// A running machine keeps the host's files.
    #[error("take the host's files away from {machine}")]
    Confine {
        /// The VMM.
        machine: &'static str,
        /// The failed step.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A running machine cannot be given another network card.
    #[error("plug a network card into {machine}")]
    Plug {
        /// The VMM.
        machine: &'static str,
        /// The VMM's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
