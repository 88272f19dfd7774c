//! Devices of a spec. A container can have the devices that every guest has, and block devices of the host, which become
//! disks. Other devices of the host do not exist in a VM.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

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

/// A block device of the host that a container uses as a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// Its numbers on the host.
    pub(crate) major: i64,
    pub(crate) minor: i64,
    /// The container's rules for devices do not allow it to write.
    pub(crate) read_only: bool,
}

/// How many of the host's devices a message names.
const NAMED_MAX: usize = 5;

/// Removes the host's devices from a privileged container, and rejects them in other containers. Of devices with one
/// path, keeps the last: clients list all devices of a privileged container, and again those that the user names.
///
/// Returns the block devices of the host, except for those of a privileged container: clients list all that there are.
pub(super) fn rewrite_devices(linux: &mut Linux, findings: &mut Findings) -> Vec<BlockDevice> {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let privileged = allow_everything(&rules);
    let Some(devices) = linux.devices_mut().take() else {
        remove_rules(linux, &[], findings);
        return Vec::new();
    };
    let is_kept = |device: &LinuxDevice| is_in_guest(device) || !privileged && device.typ() == LinuxDeviceType::B;
    let (kept, others): (Vec<_>, Vec<_>) = devices.into_iter().partition(is_kept);
    if privileged && !others.is_empty() {
        findings.note(format!("linux.devices: removed {} host devices, which the VM does not have", others.len()));
    } else if !others.is_empty() {
        findings.reject(
            "linux.devices",
            None,
            format!("devices of the host cannot be used in a VM: {}", list(&others)),
        );
    }
    let mut unique: Vec<LinuxDevice> = Vec::new();
    for device in kept {
        match unique.iter_mut().find(|other| other.path() == device.path()) {
            Some(other) => *other = device,
            None => unique.push(device),
        }
    }
    let mut block_devices: Vec<BlockDevice> = Vec::new();
    for device in unique.iter().filter(|device| device.typ() == LinuxDeviceType::B) {
        let (major, minor) = (device.major(), device.minor());
        if !block_devices.iter().any(|known| (known.major, known.minor) == (major, minor)) {
            block_devices.push(BlockDevice { major, minor, read_only: !is_writable(&rules, major, minor) });
        }
    }
    linux.set_devices(Some(unique));
    remove_rules(linux, &block_devices, findings);
    block_devices
}

/// Removes rules for single block devices of the host that the container does not have: the guest gives the same numbers
/// to other devices.
fn remove_rules(linux: &mut Linux, devices: &[BlockDevice], findings: &mut Findings) {
    let Some(resources) = linux.resources_mut() else { return };
    let Some(rules) = resources.devices_mut().take() else { return };
    let is_known = |rule: &LinuxDeviceCgroup| match (rule.typ(), rule.major(), rule.minor()) {
        (Some(LinuxDeviceType::B), Some(major), minor) if major >= 0 => {
            devices.iter().any(|device| device.major == major && minor == Some(device.minor))
        }
        _ => true,
    };
    let (kept, others): (Vec<_>, Vec<_>) = rules.into_iter().partition(is_known);
    if !others.is_empty() {
        let count = others.len();
        findings.note(format!("linux.resources.devices: removed {count} rules for block devices of the host"));
    }
    resources.set_devices(Some(kept));
}

/// Whether the rules allow the container to write to a block device. The last rule that says so decides.
fn is_writable(rules: &[LinuxDeviceCgroup], major: i64, minor: i64) -> bool {
    let covers = |rule: &&LinuxDeviceCgroup| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
            && rule.access().as_deref().is_none_or(|access| access.contains('w'))
            && rule.major().is_none_or(|number| number < 0 || number == major)
            && rule.minor().is_none_or(|number| number < 0 || number == minor)
    };
    rules.iter().rfind(covers).is_some_and(|rule| rule.allow())
}

/// Names the first devices, and counts the others.
fn list(devices: &[LinuxDevice]) -> String {
    let name = |device: &LinuxDevice| {
        format!("{} ({} {}:{})", device.path().display(), device.typ().as_str(), device.major(), device.minor())
    };
    let named = devices.iter().take(NAMED_MAX).map(name).collect::<Vec<_>>().join(", ");
    match devices.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// Whether the rules allow every device, apart from rules for single devices. Clients then list all devices of the host
/// in the spec. The last rule that covers every device decides, as on cgroup v1.
fn allow_everything(rules: &[LinuxDeviceCgroup]) -> bool {
    let covers_all = |rule: &&LinuxDeviceCgroup| {
        let any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        let any_access =
            rule.access().as_deref().is_none_or(|access| ['r', 'w', 'm'].iter().all(|&kind| access.contains(kind)));
        any_type && any_access && rule.major().is_none_or(|n| n < 0) && rule.minor().is_none_or(|n| n < 0)
    };
    rules.iter().rfind(covers_all).is_some_and(|rule| rule.allow())
}

/// Whether the guest has the device. A fifo is created in the container, so it is never the host's.
fn is_in_guest(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => guest_path(device.major(), device.minor()).is_some(),
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}
