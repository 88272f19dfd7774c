//! Tap devices: Documentation/networking/tuntap.rst of the kernel.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use nix::net::if_::if_nametoindex;

use super::error::ObjectError;
use super::netlink::Netlink;

const CLONE_DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr_mrg_rxbuf` precedes each frame. QEMU asks for this length too.
const VNET_HEADER: libc::c_int = 12;
/// The group of husk's taps in a namespace: `husk` in ASCII. Other devices have group 0 unless an administrator has
/// given them another.
const GROUP: u32 = 0x6875_736b;

mod ioctl {
    // linux/if_tun.h. The kernel encodes TUNSETIFF with the size of an int, but takes a `struct ifreq`.
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));
    nix::ioctl_write_ptr!(set_vnet_header_size, b'T', 216, libc::c_int);
}

/// A tap device. It vanishes with the last of its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tap {
    pub(super) name: String,
    pub(super) index: u32,
}

/// Creates a tap in the thread's network namespace: without IPv6, and down, so that it has no carrier. Returns a
/// descriptor for each queue pair as well.
pub(super) fn create(
    netlink: &mut Netlink,
    name: &str,
    alias: String,
    queues: u16,
) -> Result<(Tap, Vec<OwnedFd>), ObjectError> {
    let object = format!("tap {name}");
    let descriptors = (0..queues.max(1))
        .map(|queue| open_queue(&object, name, queue == 0, queues > 1).map(OwnedFd::from))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((enter(netlink, name, alias)?, descriptors))
}

/// Moves a tap, which is down, to the network namespace of a descriptor. `netlink` belongs to the namespace that it is in.
pub(super) fn send(netlink: &mut Netlink, tap: &Tap, namespace: RawFd) -> Result<(), ObjectError> {
    let action = "move it to another network namespace";
    set(netlink, tap, action, |message| message.attributes.push(LinkAttribute::NetNsFd(namespace)))
}

/// Finds a tap that has come to the thread's network namespace, and sets it up: without IPv6, in husk's group, with the
/// alias that `ip link` shows.
pub(super) fn enter(netlink: &mut Netlink, name: &str, alias: String) -> Result<Tap, ObjectError> {
    let object = format!("tap {name}");
    let index = if_nametoindex(name).map_err(|errno| ObjectError::system(&object, "find its index")(errno.into()))?;
    disable_ipv6(name).map_err(ObjectError::system(&object, "disable IPv6"))?;
    let tap = Tap { name: name.to_owned(), index };
    set(netlink, &tap, "set its alias and group", |message| {
        message.attributes.extend([LinkAttribute::IfAlias(alias), LinkAttribute::Group(GROUP)]);
    })?;
    Ok(tap)
}

/// Removes all of husk's taps in the namespace, even those that a process has open. The kernel waits for two RCU grace
/// periods, some 20 ms, and does so once per request: a process that exits waits once for each tap.
pub(super) fn remove_all(netlink: &mut Netlink) -> Result<(), ObjectError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(GROUP));
    match netlink.change(RouteNetlinkMessage::DelLink(message), 0) {
        // The namespace has none.
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        other => other.map_err(|error| error.at("the VM's taps", "remove them")),
    }
}

/// Creates a tap that only reserves a name for a moment: no VM can take the link whose tap has it. None if a VM has it.
pub(super) fn reserve(name: &str) -> Result<Option<OwnedFd>, ObjectError> {
    match open_queue(&format!("tap {name}"), name, true, false) {
        Ok(file) => Ok(Some(file.into())),
        Err(ObjectError::System { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives a tap that is down another name. Fails if a device of the namespace has the name.
pub(super) fn rename(netlink: &mut Netlink, tap: &mut Tap, name: String) -> Result<(), ObjectError> {
    let action = "rename it (its new name exists if another VM uses the link)";
    set(netlink, tap, action, |message| message.attributes.push(LinkAttribute::IfName(name.clone())))?;
    tap.name = name;
    Ok(())
}

/// Gives a tap its link's MTU, and the alias that `ip link` shows.
pub(super) fn describe(netlink: &mut Netlink, tap: &Tap, alias: String, mtu: Option<u32>) -> Result<(), ObjectError> {
    set(netlink, tap, "set its MTU", |message| {
        message.attributes.extend(mtu.map(LinkAttribute::Mtu));
        message.attributes.push(LinkAttribute::IfAlias(alias));
    })
}

/// Brings a tap up or takes it down.
pub(super) fn set_up(netlink: &mut Netlink, tap: &Tap, up: bool) -> Result<(), ObjectError> {
    let action = if up { "bring it up" } else { "take it down" };
    set(netlink, tap, action, |message| {
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        message.header.change_mask = LinkFlags::Up;
    })
}

fn set(
    netlink: &mut Netlink,
    tap: &Tap,
    action: &'static str,
    change: impl FnOnce(&mut LinkMessage),
) -> Result<(), ObjectError> {
    let mut message = LinkMessage::default();
    message.header.index = tap.index;
    change(&mut message);
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .map_err(|error| error.at(format!("tap {}", tap.name), action))
}

fn open_queue(object: &str, name: &str, first: bool, several: bool) -> Result<File, ObjectError> {
    let failed = |action: String| ObjectError::system(object, action);
    let file =
        OpenOptions::new().read(true).write(true).open(CLONE_DEVICE).map_err(failed(format!("open {CLONE_DEVICE}")))?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if first {
        // Fails with EBUSY instead of joining a tap that another VM uses.
        flags |= libc::IFF_TUN_EXCL;
    }
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The kernel reads the low 16 bits; IFF_TUN_EXCL is the highest of them.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let descriptor = file.as_raw_fd();
    let create = || {
        failed(if first {
            "create it (busy if another VM uses the namespace)".into()
        } else {
            "add a queue to it".into()
        })
    };
    // SAFETY: the descriptor is open and the request is an ifreq.
    unsafe { ioctl::set_interface(descriptor, &request) }.map_err(|errno| create()(errno.into()))?;
    // SAFETY: the descriptor is open and the argument is an int.
    unsafe { ioctl::set_vnet_header_size(descriptor, &VNET_HEADER) }
        .map_err(|errno| failed("set the length of its headers".into())(errno.into()))?;
    // QEMU enables what the guest's driver accepts.
    // SAFETY: the descriptor is open and the argument is a number.
    unsafe { ioctl::set_offload(descriptor, 0) }
        .map_err(|errno| failed("disable its offloads".into())(errno.into()))?;
    Ok(file)
}

/// Without this, the tap gets a link-local address when it comes up, and sends frames of its own to the guest.
/// The kernel resolves /proc/sys/net in the network namespace of the calling thread.
fn disable_ipv6(name: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::network::error::NetworkError;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;
    use husk_protos::chain::Chain;

    fn make(namespace: &Namespace, mtu: u32, queues: u16) -> Result<(Tap, Vec<OwnedFd>), NetworkError> {
        claim(&namespace.path()).unwrap().run(Duration::from_secs(5), move |deadline| {
            let mut netlink = Netlink::open(deadline).unwrap();
            let (mut tap, queues) = create(&mut netlink, "husk-s0", "husk VM a/b: spare".into(), queues)?;
            rename(&mut netlink, &mut tap, "husk-12".into())?;
            describe(&mut netlink, &tap, "husk VM a/b: eth0".into(), Some(mtu))?;
            set_up(&mut netlink, &tap, true)?;
            Ok((tap, queues))
        })
    }

    #[test]
    fn a_tap_has_the_links_mtu_and_no_ipv6_and_vanishes_with_its_descriptors() {
        let namespace = Namespace::new();
        for queues in [1, 3] {
            let (tap, descriptors) = make(&namespace, 1400, queues).unwrap();
            assert_eq!(descriptors.len(), usize::from(queues));
            let shown = &namespace.ip_json("addr show dev husk-12")[0];
            assert_eq!((&shown["mtu"], &shown["ifalias"]), (&1400.into(), &"husk VM a/b: eth0".into()));
            assert_eq!(shown["ifindex"], tap.index);
            assert_eq!(shown["addr_info"].as_array().unwrap().len(), 0, "{shown}");
            assert!(shown["flags"].as_array().unwrap().contains(&"UP".into()), "{shown}");
            let data = &shown["linkinfo"]["info_data"];
            assert_eq!(
                (data["type"].as_str(), data["pi"].as_bool(), data["vnet_hdr"].as_bool(), data["persist"].as_bool()),
                (Some("tap"), Some(false), Some(true), Some(false)),
                "{shown}"
            );
            assert_eq!(data["multi_queue"], queues > 1, "{shown}");
            drop(descriptors);
            namespace.wait_until_taps_are_gone();
        }
    }

    #[test]
    fn all_taps_are_removed_at_once_although_a_process_has_them_open_and_other_devices_stay() {
        let namespace = Namespace::new();
        namespace.ip("tuntap add name other mode tap");
        let removed = claim(&namespace.path()).unwrap().run(Duration::from_secs(5), |deadline| {
            let mut netlink = Netlink::open(deadline).unwrap();
            let taps = ["husk-s0", "husk-s1"].map(|name| create(&mut netlink, name, String::new(), 2));
            let taps: Vec<_> = taps.into_iter().collect::<Result<_, _>>()?;
            remove_all(&mut netlink)?;
            // None is left.
            remove_all(&mut netlink)?;
            Ok(taps)
        });
        let _open = removed.unwrap();
        let links = namespace.ip("link");
        assert!(!links.contains("husk-") && links.contains("other"), "{links}");
    }

    #[test]
    fn a_tap_of_another_vm_is_not_joined() {
        type Work = fn(&mut Netlink) -> Result<(Tap, Vec<OwnedFd>), ObjectError>;
        let namespace = Namespace::new();
        let run = |work: Work| {
            let claim = claim(&namespace.path()).unwrap();
            claim.run(Duration::from_secs(5), move |deadline| work(&mut Netlink::open(deadline).unwrap()))
        };
        let _first = run(|netlink| create(netlink, "husk-s0", String::new(), 2)).unwrap();
        let error = run(|netlink| create(netlink, "husk-s0", String::new(), 2)).unwrap_err();
        let expected = "tap husk-s0: create it (busy if another VM uses the namespace): Device or resource busy";
        assert!(Chain(&error).to_string().contains(expected), "{}", Chain(&error));
        let _second = make(&Namespace::new(), 1500, 1).unwrap();
        let taken = run(|netlink| {
            assert!(reserve("husk-s0")?.is_none());
            let reserved = reserve("husk-12")?;
            let (mut tap, _queues) = create(netlink, "husk-s1", String::new(), 1)?;
            assert!(rename(netlink, &mut tap, "husk-12".into()).is_err());
            drop(reserved);
            rename(netlink, &mut tap, "husk-12".into())?;
            Ok((tap, Vec::new()))
        });
        taken.unwrap();
    }

    #[test]
    fn an_mtu_that_a_tap_cannot_have_is_an_error() {
        let error = make(&Namespace::new(), 65535, 1).unwrap_err();
        let text = Chain(&error).to_string();
        assert!(text.contains("tap husk-12: set its MTU: "), "{text}");
    }
}
