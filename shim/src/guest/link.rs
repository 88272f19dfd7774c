//! How the shim and a guest reach each other: over the vsock device in this process, or over the kernel's, where the guest's CID is leased and the port
//! on which it says that it is ready is its own.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use husk_protos::PORT_READY;

use crate::state::cid::{CIDS, CidError, Holder};
use crate::state::journal::Journal;
use crate::state::{Owner, StateError, Step};
use husk_vsock::{Device, Listener, Stream, kernel};

/// CID of a guest with a device of its own: they need not differ. 0 to 2 are reserved (vsock(7)).
pub const OWN_CID: u32 = 3;
/// With the kernel's device, a guest with the CID n dials port 65536 + n: beyond the ports that anybody else of the house has.
const READY_PORTS: u32 = 1 << 16;

/// Which device carries the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// The vhost-user device in this process.
    Own,
    /// The kernel's vhost_vsock.
    Kernel,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device, or a port of it.
    #[error("vsock device: {0}")]
    Vsock(#[from] husk_vsock::VsockError),
    /// The kernel's device.
    #[error("open {device}: {0}", device = kernel::DEVICE)]
    Device(#[source] io::Error),
    /// The CID.
    #[error("{0}")]
    Cid(#[from] CidError),
    /// The journal.
    #[error("{0}")]
    State(#[from] StateError),
    /// The thread of the lease.
    #[error("lease a vsock CID: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// The way to a guest.
pub enum Link {
    /// Its device, which ends with this.
    Own(Device),
    /// Its CID on the kernel's.
    Kernel(u32),
}

impl Link {
    /// The guest's CID.
    pub fn cid(&self) -> u32 {
        match self {
            Self::Own(_) => OWN_CID,
            Self::Kernel(cid) => *cid,
        }
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    ///
    /// When it refuses, is gone, or does not answer in time.
    pub async fn connect(&self, port: u32, deadline: Duration) -> Result<Stream, husk_vsock::VsockError> {
        match self {
            Self::Own(device) => device.connect(port, deadline).await.map(Stream::VhostUser),
            Self::Kernel(cid) => kernel::connect(*cid, port, deadline).await.map(Stream::Kernel),
        }
    }
}

/// Where a guest says that it is ready.
pub enum Ready {
    /// A port of its own device.
    Own(Listener),
    /// A port of the machine, on which only it is heard.
    Kernel {
        /// The port.
        listener: kernel::KernelListener,
        /// Whose.
        cid: u32,
    },
}

impl Ready {
    /// What the guest's kernel has to be told, so that it finds the port.
    pub fn parameter(&self) -> Option<String> {
        match self {
            Self::Own(_) => None,
            Self::Kernel { cid, .. } => Some(format!("husk.ready_port={}", READY_PORTS + cid)),
        }
    }

    /// Its first connection.
    ///
    /// # Errors
    ///
    /// When the device has ended.
    pub async fn accept(&mut self) -> Result<Stream, husk_vsock::VsockError> {
        match self {
            Self::Own(listener) => listener.accept().await.map(Stream::VhostUser),
            Self::Kernel { listener, cid } => Ok(Stream::Kernel(listener.accept_from(*cid).await)),
        }
    }
}

/// A link, the port that it begins with, and QEMU's end.
pub struct Made {
    /// The link.
    pub link: Link,
    /// Listens already: the guest's dial could otherwise find nobody.
    pub ready: Ready,
    /// The vhost-user socket, or the kernel's device, with the CID.
    pub qemus: OwnedFd,
}

/// Makes the link of a VM that is not started yet.
///
/// # Errors
///
/// When there is no device, no CID or no port.
pub async fn make(carrier: Carrier, journal: &Journal) -> Result<Made, Error> {
    match carrier {
        Carrier::Own => {
            let (device, qemus) = Device::start(OWN_CID.into())?;
            let ready = Ready::Own(device.listen(PORT_READY)?);
            Ok(Made { link: Link::Own(device), ready, qemus })
        }
        Carrier::Kernel => {
            let journal = journal.clone();
            let (cid, device) = tokio::task::spawn_blocking(move || lease(&journal)).await??;
            let listener = kernel::KernelListener::bind(READY_PORTS + cid)?;
            Ok(Made { link: Link::Kernel(cid), ready: Ready::Kernel { listener, cid }, qemus: device })
        }
    }
}

fn lease(journal: &Journal) -> Result<(u32, OwnedFd), Error> {
    let device = kernel::open().map_err(Error::Device)?;
    let (leases, holder) = journal.with(|state| {
        let shim = state.shim().ok_or_else(|| StateError::NotFound(state.dir().to_owned()))?;
        let holder = Holder { namespace: state.namespace().to_owned(), sandbox: state.sandbox().to_owned(), shim };
        Ok((state.leases(), holder))
    })?;
    let mut record = |cid| {
        let step = Step::Cid { cid, leases: leases.clone(), shim: holder.shim };
        journal.record(&Owner::Sandbox, [step])
    };
    let cid = leases.lease(CIDS, &holder, &mut record, &mut |cid| kernel::claim(&device, cid))?;
    Ok((cid, device.into()))
}
