//! Applies a request to the network namespace of the calling thread.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use husk_protos::mac::mac_text;
use husk_protos::network::ConfigureNetworkRequest;

use super::driver::Driver;
use super::error::{NetlinkError, NetworkError};
use super::message::{decode_device, encode, list_links};
use super::model::{Applied, Device, Mac, Sysctl};
use super::netlink::Netlink;
use super::plan::{Change, plan};
use super::resolve::{find_device, find_nic, resolve};

/// Makes the network match `request`. `last` is what the requests before it left, and becomes what this one leaves.
///
/// # Errors
/// The first object of the request that is invalid, in which case nothing has changed, or the first change that the
/// kernel rejected. The changes before it remain, and the next request starts from them.
pub(super) fn configure(
    request: &ConfigureNetworkRequest,
    last: &mut Applied,
    driver: &dyn Driver,
) -> Result<(), NetworkError> {
    let spares = request.spare_nics.iter().map(|mac| spare(mac)).collect::<Result<Vec<_>, _>>()?;
    let mut netlink = Netlink::open()?;
    let mut present = devices(&mut netlink)?;
    let before: Vec<u32> = present.iter().map(|device| device.index).collect();
    if request.links.iter().any(|link| find_nic(link, &present).is_none()) {
        driver.attach(&spares).map_err(NetworkError::Attach)?;
        present = devices(&mut netlink)?;
    }
    let next = match resolve(request, &present) {
        Ok(next) => next,
        Err(error) => {
            // An invalid request must not leave a NIC that no link has.
            for device in present.iter().filter(|device| !before.contains(&device.index)) {
                detach(driver, device)?;
            }
            return Err(error);
        }
    };
    let changes = plan(&present, last, &next);
    let made = changes.iter().try_for_each(|change| make(&mut netlink, change));
    let result = made.and_then(|()| put_away(&mut netlink, &present, &spares, driver));
    *last = match result {
        Ok(()) => Applied::complete(next),
        Err(_) => std::mem::take(last).incomplete(next),
    };
    result
}

fn spare(mac: &[u8]) -> Result<Mac, NetworkError> {
    Mac::try_from(mac).map_err(|_| NetworkError::Invalid {
        object: format!("spare NIC {}", mac_text(mac)),
        problem: "the MAC address has not 6 bytes".into(),
    })
}

/// Takes the driver from the spare NICs that have it. The driver has left those alone that were spare at the boot, and
/// a container may have moved one to another namespace.
fn put_away(
    netlink: &mut Netlink,
    present: &[Device],
    spares: &[Mac],
    driver: &dyn Driver,
) -> Result<(), NetworkError> {
    if spares.iter().all(|mac| find_device(present, *mac).is_none()) {
        return Ok(());
    }
    // The changes may have renamed them.
    let present = devices(netlink)?;
    let mut idle = spares.iter().filter_map(|mac| find_device(&present, *mac));
    idle.try_for_each(|device| detach(driver, device))
}

fn detach(driver: &dyn Driver, device: &Device) -> Result<(), NetworkError> {
    driver.detach(&device.name).map_err(|source| NetworkError::Detach { name: device.name.clone(), source })
}

/// Lists the links of a socket's namespace.
fn devices(netlink: &mut Netlink) -> Result<Vec<Device>, NetworkError> {
    let links = netlink.dump(&list_links()).map_err(NetworkError::List)?;
    Ok(links.into_iter().filter_map(decode_device).collect())
}

fn make(netlink: &mut Netlink, change: &Change) -> Result<(), NetworkError> {
    if let Change::SetSysctl(sysctl) = change {
        return write(sysctl).map_err(|source| NetworkError::Sysctl { change: change.to_string(), source });
    }
    let Some((message, flags)) = encode(change) else { return Ok(()) };
    match netlink.change(message, flags) {
        Err(error) if !is_done(change, &error) => {
            Err(NetworkError::Change { change: change.to_string(), source: error })
        }
        _ => Ok(()),
    }
}

/// Sets a sysctl. /proc/sys shows those of the calling thread's network namespace.
fn write(sysctl: &Sysctl) -> io::Result<()> {
    // Without `create`: /proc/sys would reply EACCES for a file that does not exist.
    let mut file = OpenOptions::new().write(true).open(Path::new("/proc/sys/net").join(&sysctl.path))?;
    // In one call: the kernel takes each write for a whole value.
    file.write_all(sysctl.value.as_bytes())
}

/// Whether the error means that there is nothing to do.
fn is_done(change: &Change, error: &NetlinkError) -> bool {
    let Some(errno) = error.errno() else { return false };
    match change {
        Change::Add(_) => errno == libc::EEXIST,
        // The object is gone, or the link with everything on it.
        Change::Remove(_) | Change::Down(_) => {
            [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENODEV].contains(&errno)
        }
        // The kernel has no IPv6, or not on a link with such a small MTU.
        Change::NoLinkLocal(_) => errno == libc::EAFNOSUPPORT,
        Change::Rename { .. }
        | Change::SetMac { .. }
        | Change::SetMtu { .. }
        | Change::SetSysctl(_)
        | Change::Up(_)
        | Change::ReportCarrier(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::model::{LinkId, Neighbour, Object};
    use super::*;

    #[test]
    fn an_error_of_the_kernel_counts_unless_the_change_is_already_made() {
        let link = LinkId { index: 2, name: "eth0".into() };
        let object = Object::Neighbour(Neighbour { link: link.clone(), address: [10, 0, 0, 1].into(), mac: [0; 6] });
        let (add, remove) = (Change::Add(object.clone()), Change::Remove(object));
        let rename = Change::Rename { index: 2, from: "eth0".into(), to: "eth1".into() };
        let table = [
            (&add, libc::EEXIST, true),
            (&add, libc::ENODEV, false),
            (&add, libc::ESRCH, false),
            (&remove, libc::ESRCH, true),
            (&remove, libc::ENODEV, true),
            (&remove, libc::EADDRNOTAVAIL, true),
            (&remove, libc::EPERM, false),
            (&rename, libc::EEXIST, false),
            (&Change::NoLinkLocal(link.clone()), libc::EAFNOSUPPORT, true),
            (&Change::Up(link.clone()), libc::ENODEV, false),
            (&Change::Down(link), libc::ENODEV, true),
        ];
        for (change, errno, expected) in table {
            let explained = |source| NetlinkError::Explained { explanation: "because".into(), source };
            let error = || io::Error::from_raw_os_error(errno);
            assert_eq!(is_done(change, &NetlinkError::Rejected(error())), expected, "{change}: {errno}");
            assert_eq!(is_done(change, &explained(error())), expected, "{change}: {errno}");
            assert!(!is_done(change, &NetlinkError::Receive(error())), "{change}: {errno}");
        }
    }
}
