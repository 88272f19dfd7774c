//! The kernel's list of SCSI disks, over sysfs(5). The kernel does not look for disks by itself
//! (scsi_mod.scan=manual): it would ask for every number that a controller can have.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The controllers.
const HOSTS: &str = "/sys/class/scsi_host";
/// All disks and other units.
const UNITS: &str = "/sys/class/scsi_device";

/// Makes the kernel look for a disk with this target on every controller. It becomes a block device a little later.
///
/// # Errors
/// Those of sysfs, and NotFound without a controller.
pub(super) fn search(target: u32) -> io::Result<()> {
    let mut none = true;
    for host in list(HOSTS)? {
        // Channel, target, unit.
        fs::write(host.join("scan"), format!("0 {target} 0"))?;
        none = false;
    }
    if none { Err(io::Error::new(ErrorKind::NotFound, "the machine has no SCSI controller")) } else { Ok(()) }
}

/// The name of the block device with this target, once the kernel has found it.
///
/// # Errors
/// Those of sysfs.
pub(super) fn disk(target: u32) -> io::Result<Option<String>> {
    for unit in list(UNITS)? {
        if is_target(&unit, target)
            && let Some(device) = list(unit.join("device/block"))?.first()
        {
            return Ok(Some(name_of(device)));
        }
    }
    Ok(None)
}

/// Makes the kernel write a disk's cache back and forget the disk.
///
/// # Errors
/// Those of sysfs.
pub(super) fn forget(name: &str) -> io::Result<()> {
    remove(&Path::new("/sys/class/block").join(name).join("device"))
}

/// Makes the kernel forget whatever has this target.
///
/// # Errors
/// Those of sysfs.
pub(super) fn forget_target(target: u32) -> io::Result<()> {
    for unit in list(UNITS)? {
        if is_target(&unit, target) {
            remove(&unit.join("device"))?;
        }
    }
    Ok(())
}

/// Whether a unit's name, HOST:CHANNEL:TARGET:UNIT, has this target.
fn is_target(unit: &Path, target: u32) -> bool {
    name_of(unit).split(':').nth(2).and_then(|part| part.parse().ok()) == Some(target)
}

fn remove(device: &Path) -> io::Result<()> {
    match fs::write(device.join("delete"), "1") {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn list(folder: impl AsRef<Path>) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_the_third_number() {
        for (name, expected) in [("0:0:7:0", true), ("7:7:0:7", false), ("0:0:70:0", false), ("7", false)] {
            assert_eq!(is_target(Path::new(name), 7), expected, "{name}");
        }
    }
}
