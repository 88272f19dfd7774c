//! Puts disks into a spec, once the guest has them.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, Mount};

use super::mounts::Mappings;
use super::rewrite::Rewritten;

/// The numbers of a device.
type Numbers = (i64, i64);

impl Rewritten {
    /// Whether the spec needs a disk.
    pub(crate) fn has_disks(&self) -> bool {
        !self.block_devices.is_empty() || !self.direct.is_empty()
    }

    /// Mounts the filesystem that the guest has at `source`, before what the spec mounts below `destination`. Call it
    /// after [`Rewritten::place`], which knows mounts by their places in the list.
    pub(crate) fn mount_disk(&mut self, source: &Path, destination: &Path, read_only: bool) {
        let mut mount = Mount::default();
        mount.set_destination(destination.to_owned());
        mount.set_typ(Some("bind".to_owned()));
        mount.set_source(Some(source.to_owned()));
        let options = ["rbind", "rprivate", if read_only { "ro" } else { "rw" }];
        mount.set_options(Some(options.map(str::to_owned).to_vec()));
        // The owners of its files are those that the container sees, whatever its mapping is.
        if let Some(own) = self.spec.linux().as_ref().and_then(Mappings::of_container) {
            own.of_guest(&mut mount, false);
        }
        let mut mounts = self.spec.mounts_mut().take().unwrap_or_default();
        let below = mounts.iter().position(|other| other.destination().starts_with(destination));
        mounts.insert(below.unwrap_or(mounts.len()), mount);
        self.spec.set_mounts(Some(mounts));
    }

    /// Sets the source of the spec's mount `index` to the filesystem that the guest has at `source`. Call it before
    /// [`Rewritten::mount_disk`], which adds mounts to the list.
    pub(crate) fn place_disk(&mut self, index: usize, source: &Path) {
        if let Some(mount) = self.spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(index)) {
            mount.set_source(Some(source.to_owned()));
        }
    }

    /// Gives the container's block devices, and the rules for them, the numbers that they have in the guest.
    pub(crate) fn place_devices(&mut self, numbers: &[(Numbers, Numbers)]) {
        let numbers: HashMap<Numbers, Numbers> = numbers.iter().copied().collect();
        let Some(linux) = self.spec.linux_mut() else { return };
        for device in linux.devices_mut().iter_mut().flatten() {
            let found = numbers.get(&(device.major(), device.minor()));
            if let (LinuxDeviceType::B, Some((major, minor))) = (device.typ(), found) {
                device.set_major(*major).set_minor(*minor);
            }
        }
        let rules = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut());
        for rule in rules.into_iter().flatten() {
            let of_rule = rule.major().zip(rule.minor());
            let found = of_rule.and_then(|host| numbers.get(&host));
            if let (Some(LinuxDeviceType::B), Some((major, minor))) = (rule.typ(), found) {
                rule.set_major(Some(*major)).set_minor(Some(*minor));
            }
        }
    }
}
