//! Devices of a spec. A container can have the devices that every guest has; devices of the host do not exist in a VM.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType};

use super::findings::Findings;

/// Character devices that have the same numbers on every kernel, and so in the guest
/// (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64, &str); 11] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (5, 1, "/dev/console"),
    (5, 2, "/dev/ptmx"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// The guest's path of a character device, if every guest has the device.
pub(super) fn guest_path(major: i64, minor: i64) -> Option<&'static Path> {
    GUEST_DEVICES.iter().find(|(a, b, _)| (*a, *b) == (major, minor)).map(|(_, _, path)| Path::new(*path))
}

/// Removes the host's devices from a privileged container, and rejects them in other containers.
pub(super) fn rewrite_devices(linux: &mut Linux, findings: &mut Findings) {
    let privileged = is_privileged(linux);
    let Some(devices) = linux.devices_mut().take() else { return };
    let (kept, others): (Vec<_>, Vec<_>) = devices.into_iter().enumerate().partition(|(_, d)| is_in_guest(d));
    if privileged && !others.is_empty() {
        findings.note(format!("linux.devices: removed {} host devices, which the VM does not have", others.len()));
    } else {
        for (index, device) in &others {
            let why = format!(
                "device {} {}:{} of the host cannot be used in a VM",
                device.typ().as_str(),
                device.major(),
                device.minor()
            );
            findings.reject_path(format!("linux.devices[{index}].path"), device.path(), why);
        }
    }
    linux.set_devices(Some(kept.into_iter().map(|(_, device)| device).collect()));
}

/// Whether the device rules allow every device. Clients then list all devices of the host in the spec.
fn is_privileged(linux: &Linux) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    rules.and_then(|rules| rules.last()).is_some_and(|rule| {
        let any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        rule.allow() && any_type && rule.major().is_none_or(|n| n < 0) && rule.minor().is_none_or(|n| n < 0)
    })
}

/// Whether the guest has the device. A fifo is created in the container, so it is never the host's.
fn is_in_guest(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => guest_path(device.major(), device.minor()).is_some(),
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}
