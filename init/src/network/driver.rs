//! The NICs' driver. A NIC that no link has is left without it: a container in the VM's namespace would see the NIC's
//! network device, and a container under runc has none.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use husk_protos::HELD_NICS;
use husk_protos::mac::mac_text;

use super::model::Mac;

/// A virtio network device (virtio 1.2, 5), as sysfs prints it.
const NETWORK_DEVICE: &str = "0x0001";

/// What gives NICs their network devices, and takes them away.
pub(super) trait Driver {
    /// Searches for NICs that were plugged into the running machine, and gives every NIC a network device that has none,
    /// except for those of `held`. The kernel has no driver that would notice a plugged NIC.
    fn attach(&self, held: &[Mac]) -> io::Result<()>;

    /// Takes away the NIC with the network device `name` of the calling thread's namespace.
    fn detach(&self, name: &str) -> io::Result<()>;
}

/// The kernel's virtio_net, over sysfs(5).
pub(super) struct VirtioNet {
    sys: PathBuf,
}

impl Default for VirtioNet {
    fn default() -> Self {
        Self { sys: "/sys".into() }
    }
}

impl VirtioNet {
    fn driver(&self, file: &str) -> PathBuf {
        self.sys.join("bus/virtio/drivers/virtio_net").join(file)
    }

    /// The virtio network devices without a driver.
    fn idle(&self) -> io::Result<Vec<PathBuf>> {
        let mut idle = Vec::new();
        for entry in fs::read_dir(self.sys.join("bus/virtio/devices"))? {
            let device = entry?.path();
            let is_nic = fs::read_to_string(device.join("device"))?.trim_end() == NETWORK_DEVICE;
            if is_nic && !device.join("driver").exists() {
                idle.push(device);
            }
        }
        Ok(idle)
    }
}

impl Driver for VirtioNet {
    fn attach(&self, held: &[Mac]) -> io::Result<()> {
        let held: Vec<String> = held.iter().map(|mac| mac_text(mac)).collect();
        // kernel-config/patches/virtio-net-held.patch. Without it, the driver takes the held NICs as well, and they are
        // detached afterwards. The newline, because the empty list must be written too.
        unless_missing(write(&self.sys.join(HELD_NICS.1), &(held.join(",") + "\n")))?;
        // Documentation/ABI/testing/sysfs-bus-pci. The kernel has probed what it has found when the write returns. A
        // kernel without PCI has no such file.
        unless_missing(write(&self.sys.join("bus/pci/rescan"), "1"))?;
        for device in self.idle()? {
            match write(&self.driver("bind"), file_name(&device)?) {
                Ok(()) => {}
                // The driver leaves it alone.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let device = fs::read_link(self.sys.join("class/net").join(name).join("device"))?;
        write(&self.driver("unbind"), file_name(&device)?)
    }
}

/// The device's name on its bus, such as `virtio3`.
fn file_name(device: &Path) -> io::Result<&str> {
    let name = device.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("{} names no device", device.display())))
}

/// Writes to a file that exists.
fn write(path: &Path, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(path)?, text.as_bytes())
}

fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_network_devices_without_a_driver_are_bound() {
        let dir = tempfile::tempdir().unwrap();
        let driver = VirtioNet { sys: dir.path().to_owned() };
        let devices = dir.path().join("bus/virtio/devices");
        for (name, kind) in [("virtio0", "0x0001\n"), ("virtio1", "0x0013\n"), ("virtio2", "0x0001\n")] {
            fs::create_dir_all(devices.join(name)).unwrap();
            fs::write(devices.join(name).join("device"), kind).unwrap();
        }
        fs::create_dir_all(driver.driver("")).unwrap();
        symlink(driver.driver(""), devices.join("virtio2/driver")).unwrap();
        assert_eq!(driver.idle().unwrap(), [devices.join("virtio0")]);
        // A kernel with neither PCI nor the list of held NICs.
        fs::write(driver.driver("bind"), "").unwrap();
        driver.attach(&[]).unwrap();
        assert_eq!(fs::read_to_string(driver.driver("bind")).unwrap(), "virtio0");

        let held = dir.path().join(HELD_NICS.1);
        fs::create_dir_all(held.parent().unwrap()).unwrap();
        fs::write(&held, "x").unwrap();
        driver.attach(&[]).unwrap();
        assert_eq!(fs::read_to_string(&held).unwrap(), "\n");
        driver.attach(&[[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 0xab]]).unwrap();
        assert_eq!(fs::read_to_string(&held).unwrap(), "02:00:00:00:00:01,02:00:00:00:00:ab\n");
    }

    #[test]
    fn a_network_device_is_taken_from_the_device_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let driver = VirtioNet { sys: dir.path().to_owned() };
        fs::create_dir_all(driver.driver("")).unwrap();
        fs::write(driver.driver("unbind"), "").unwrap();
        fs::create_dir_all(dir.path().join("class/net/eth0")).unwrap();
        symlink("../../../virtio7", dir.path().join("class/net/eth0/device")).unwrap();
        driver.detach("eth0").unwrap();
        assert_eq!(fs::read_to_string(driver.driver("unbind")).unwrap(), "virtio7");
        assert_eq!(driver.detach("lo").unwrap_err().kind(), ErrorKind::NotFound);
    }
}
