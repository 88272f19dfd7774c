//! Keeps the NICs that no link has in a network namespace of their own: a container in the VM's namespace would see
//! them, and a container under runc has none.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use husk_protos::mac::mac_text;
use husk_protos::network::ConfigureNetworkRequest;
use nix::sched::{CloneFlags, unshare};

use super::error::NetworkError;
use super::message::{decode_device, list_links, move_link};
use super::model::{Device, Mac, Network};
use super::netlink::Netlink;
use super::resolve::find_device;

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// The namespace of the spare NICs. Its descriptors keep it.
pub(super) struct Spares {
    namespace: OwnedFd,
    /// A socket in the namespace.
    netlink: Netlink,
}

impl Spares {
    /// Creates the namespace. unshare(2) moves only the calling thread, so a thread of its own does it.
    fn create() -> Result<Self, NetworkError> {
        let create = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| NetworkError::Spares(errno.into()))?;
            let namespace = File::open(OWN).map_err(NetworkError::Spares)?.into();
            Ok(Self { namespace, netlink: Netlink::open()? })
        };
        match std::thread::spawn(create).join() {
            Ok(created) => created,
            Err(_) => Err(NetworkError::Spares(io::Error::other("the thread panicked"))),
        }
    }

    /// The NICs in the namespace.
    pub(super) fn devices(&mut self) -> Result<Vec<Device>, NetworkError> {
        devices(&mut self.netlink).map(|mut devices| {
            devices.retain(|device| !device.loopback);
            devices
        })
    }

    /// Moves those of `spares` that `network` has links for to the namespace of the calling thread. Returns whether
    /// there was one.
    pub(super) fn give(&mut self, spares: &[Device], network: &Network) -> Result<bool, NetworkError> {
        let wanted = |device: &&Device| network.links.iter().any(|link| link.id.index == device.index);
        let mut given = false;
        for device in spares.iter().filter(wanted) {
            let own = File::open(OWN).map_err(NetworkError::Spares)?;
            carry(&mut self.netlink, device, own.as_raw_fd(), "take up")?;
            given = true;
        }
        Ok(given)
    }
}

/// Moves the spare NICs of a request that are among `devices` of the calling thread's namespace, where `netlink` is, to
/// the namespace of the spare NICs.
pub(super) fn put_away(
    netlink: &mut Netlink,
    devices: &[Device],
    request: &ConfigureNetworkRequest,
    spares: &mut Option<Spares>,
) -> Result<(), NetworkError> {
    for mac in &request.spare_nics {
        let mac = Mac::try_from(mac.as_slice()).map_err(|_| NetworkError::Invalid {
            object: format!("spare NIC {}", mac_text(mac)),
            problem: "the MAC address has not 6 bytes".into(),
        })?;
        // Put away already, or moved to another namespace by a container.
        let Some(device) = find_device(devices, mac) else { continue };
        let spares = match spares {
            Some(spares) => spares,
            None => spares.insert(Spares::create()?),
        };
        carry(netlink, device, spares.namespace.as_raw_fd(), "put away")?;
    }
    Ok(())
}

/// Lists the links of a socket's namespace.
pub(super) fn devices(netlink: &mut Netlink) -> Result<Vec<Device>, NetworkError> {
    let links = netlink.dump(&list_links()).map_err(NetworkError::List)?;
    Ok(links.into_iter().filter_map(decode_device).collect())
}

fn carry(netlink: &mut Netlink, device: &Device, namespace: i32, action: &str) -> Result<(), NetworkError> {
    netlink.change(move_link(device, namespace), 0).map_err(|source| NetworkError::Change {
        change: format!("{action} NIC {} ({})", device.name, device.mac.map(|mac| mac_text(&mac)).unwrap_or_default()),
        source,
    })
}
