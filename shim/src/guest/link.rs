//! The vsock connection between shim and guest: over the device in this process, or over the kernel's device. On the
//! kernel's device, the guest leases a CID and sends its hello to a port of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use husk_protos::{PORT_NAMES, PORT_READY, PORT_RELAY, SECRET};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::state::cid::{CIDS, CidError};
use crate::state::journal::Journal;
use crate::state::{Owner, StateError, Step};
use husk_vsock::{Device, Listener, Stream, VsockError, kernel};

/// CID of every guest with its own device: the CIDs of different devices may be equal. 0 to 2 are reserved (vsock(7)).
const OWN_CID: u32 = 3;
/// On the kernel's device, the guest with CID n connects to port 65536 + n, above all other ports of husk.
const READY_PORTS: u32 = 1 << 16;
/// For the host's Unix sockets, the guest with CID n connects to port 131072 + n, above those of all hellos.
const RELAY_PORTS: u32 = 1 << 17;
/// For DNS queries, the guest with CID n connects to port 196608 + n.
const NAMES_PORTS: u32 = 3 << 16;
const _: () = assert!(*CIDS.end() < RELAY_PORTS - READY_PORTS && *CIDS.end() < NAMES_PORTS - RELAY_PORTS);

/// The device that carries the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// The vhost-user device in this process.
    Own,
    /// The kernel's vhost_vsock.
    Kernel,
}

/// Why the link cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The device, or one of its ports.
    #[error("vsock device")]
    Vsock(#[from] VsockError),
    /// The kernel's device.
    #[error("open {}", kernel::DEVICE)]
    Device(#[source] io::Error),
    /// The CID.
    #[error(transparent)]
    Cid(#[from] CidError),
    /// The journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// The thread that leases the CID.
    #[error("lease a vsock CID")]
    Task(#[from] tokio::task::JoinError),
}

/// The connection to a guest.
pub enum Link {
    /// The guest's own device, which is removed on drop.
    Own(Device),
    /// The guest's CID on the kernel's device.
    Kernel(u32),
}

impl Link {
    /// The guest's CID.
    pub(crate) fn cid(&self) -> u32 {
        match self {
            Self::Own(_) => OWN_CID,
            Self::Kernel(cid) => *cid,
        }
    }

    /// Connects to a port of the guest, and proves with the guest's secret that the connection is the shim's.
    ///
    /// # Errors
    ///
    /// When the guest rejects the connection, is gone, or does not answer in time.
    pub(super) async fn connect(
        &self,
        port: u32,
        secret: &[u8; SECRET],
        deadline: Duration,
    ) -> Result<Stream, VsockError> {
        let mut stream = match self {
            Self::Own(device) => device.connect(port, deadline).await.map(Stream::VhostUser),
            Self::Kernel(cid) => kernel::connect(*cid, port, deadline).await.map(Stream::Kernel),
        }?;
        match timeout(deadline, stream.write_all(secret)).await {
            Ok(sent) => sent.map_err(|source| VsockError::Stream { port, source })?,
            Err(_) => return Err(VsockError::TimedOut { port, deadline }),
        }
        Ok(stream)
    }

    /// Listens for the guest's connections to the host's Unix sockets.
    ///
    /// # Errors
    ///
    /// When the port is in use.
    pub(super) fn listen_for_relays(&self) -> Result<HostPort, VsockError> {
        match self {
            Self::Own(device) => HostPort::own(device, PORT_RELAY),
            Self::Kernel(cid) => HostPort::kernel(RELAY_PORTS + cid, *cid),
        }
    }

    /// Listens for the guest's DNS queries.
    ///
    /// # Errors
    ///
    /// When the port is in use.
    pub(super) fn listen_for_queries(&self) -> Result<HostPort, VsockError> {
        match self {
            Self::Own(device) => HostPort::own(device, PORT_NAMES),
            Self::Kernel(cid) => HostPort::kernel(NAMES_PORTS + cid, *cid),
        }
    }
}

/// A port of the host that accepts connections of one guest.
pub(crate) enum HostPort {
    /// A port of the guest's own device.
    Own { listener: Listener, port: u32 },
    /// A port of the kernel's device that accepts connections from one CID only.
    Kernel { listener: kernel::KernelListener, port: u32, cid: u32 },
}

impl HostPort {
    fn own(device: &Device, port: u32) -> Result<Self, VsockError> {
        Ok(Self::Own { listener: device.listen(port)?, port })
    }

    fn kernel(port: u32, cid: u32) -> Result<Self, VsockError> {
        Ok(Self::Kernel { listener: kernel::KernelListener::bind(port)?, port, cid })
    }

    /// The port's number.
    pub(crate) fn number(&self) -> u32 {
        match self {
            Self::Own { port, .. } | Self::Kernel { port, .. } => *port,
        }
    }

    /// The port's number, if it depends on the guest.
    pub(crate) fn port(&self) -> Option<u32> {
        match self {
            Self::Own { .. } => None,
            Self::Kernel { port, .. } => Some(*port),
        }
    }

    /// The guest's next connection.
    ///
    /// # Errors
    ///
    /// When the device has ended.
    pub(crate) async fn accept(&mut self) -> Result<Stream, VsockError> {
        match self {
            Self::Own { listener, .. } => listener.accept().await.map(Stream::VhostUser),
            Self::Kernel { listener, cid, .. } => Ok(Stream::Kernel(listener.accept_from(*cid).await)),
        }
    }
}

/// The link of a VM that has not started.
pub(crate) struct NewLink {
    pub(crate) link: Link,
    /// Listens before the machine starts: the guest's connection would fail otherwise.
    pub(crate) ready: HostPort,
    /// The machine's end: the vhost-user socket, or the kernel's device with the CID set.
    pub(crate) machine_end: OwnedFd,
}

/// Creates the link of a VM that has not started.
///
/// # Errors
///
/// When there is no device, no free CID or no free port.
pub(crate) async fn create(carrier: Carrier, journal: &Journal) -> Result<NewLink, LinkError> {
    match carrier {
        Carrier::Own => {
            let (device, machine_end) = Device::start(OWN_CID.into())?;
            let ready = HostPort::own(&device, PORT_READY)?;
            Ok(NewLink { link: Link::Own(device), ready, machine_end })
        }
        Carrier::Kernel => {
            let journal = journal.clone();
            let (cid, device) = tokio::task::spawn_blocking(move || lease(&journal)).await??;
            let ready = HostPort::kernel(READY_PORTS + cid, cid)?;
            Ok(NewLink { link: Link::Kernel(cid), ready, machine_end: device })
        }
    }
}

/// Leases a CID, claims it on the kernel's device, and records the lease.
fn lease(journal: &Journal) -> Result<(u32, OwnedFd), LinkError> {
    let device = kernel::open().map_err(LinkError::Device)?;
    let (leases, holder) = journal.with(|state| Ok((state.leases(), state.holder()?)))?;
    let mut record = |cid| {
        let step = Step::Cid { cid, leases: leases.clone(), shim: holder.shim };
        journal.record(&Owner::Sandbox, [step])
    };
    let cid = leases.lease(CIDS, &holder, &mut record, &mut |cid| kernel::claim(&device, cid))?;
    Ok((cid, device.into()))
}
