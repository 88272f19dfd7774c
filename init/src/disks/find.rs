//! Finds block devices by the serial that the host gave them. Device letters are useless: they follow the order of
//! discovery.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::uevents::{drain, subscribe};

/// The kernel's list of block devices, including partitions.
const DEVICES: &str = "/sys/class/block";
/// Time for a device to appear.
const DEADLINE: Duration = Duration::from_secs(5);
/// Files of a device that contain its serial: virtio-blk's, and SCSI's page of the unit's serial number (SPC-4, 7.8.15),
/// with the length of what precedes the serial.
const SERIALS: [(&str, usize); 2] = [("serial", 0), ("device/vpd_pg80", 4)];

/// Opens the block device with this serial, and returns its name too. Waits until it appears. `search` runs once before,
/// to make the kernel look for it; `locate` returns the device's name once the kernel has found it.
///
/// # Errors
/// TimedOut when the device does not appear within 5 s, with the serials that exist; or an error of the kernel.
pub(crate) fn find(
    serial: &str,
    options: &OpenOptions,
    search: impl FnOnce() -> io::Result<()>,
    locate: impl Fn(&str) -> io::Result<Option<String>>,
) -> io::Result<(String, File)> {
    // Subscribe before the first search: a device that appears in between would be missed. An event arrives when a disk
    // is ready to be opened.
    let uevents = subscribe()?;
    search()?;
    let found = wait(&uevents, DEADLINE, || open(locate(serial)?, options))?;
    found.ok_or_else(|| {
        let present = match serials() {
            Ok(all) if all.is_empty() => "there are none".to_owned(),
            Ok(all) => {
                let all: Vec<_> = all.iter().map(|(name, serial)| format!("{name} ({serial:?})")).collect();
                format!("present: {}", all.join(", "))
            }
            Err(error) => error.to_string(),
        };
        let what = format!("no block device with serial {serial:?} within {} s; {present}", DEADLINE.as_secs());
        io::Error::new(ErrorKind::TimedOut, what)
    })
}

/// The name of the block device with this serial, among all of the machine.
///
/// # Errors
/// Those of sysfs.
pub(crate) fn by_serial(serial: &str) -> io::Result<Option<String>> {
    Ok(serials()?.into_iter().find_map(|(name, found)| (found == serial).then_some(name)))
}

/// Whether the block device with this name has this serial.
///
/// # Errors
/// Those of sysfs.
pub(super) fn has_serial(name: &str, expected: &str) -> io::Result<bool> {
    Ok(serial(&Path::new(DEVICES).join(name))?.is_some_and(|found| found == expected))
}

/// Whether an event may say that a disk can be opened. A SCSI disk causes five others.
fn is_of_disk(event: &[u8]) -> bool {
    let mut path = event.split(|byte| *byte == b'/');
    path.any(|folder| folder == b"block")
}

/// Calls `find` at once and after each batch of events of disks until it finds something. Returns None at the deadline.
fn wait<T>(
    uevents: &OwnedFd,
    deadline: Duration,
    mut find: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let (end, mut changed) = (Instant::now() + deadline, true);
    loop {
        if changed && let Some(found) = find()? {
            return Ok(Some(found));
        }
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up: otherwise the loop would spin during the last fraction of a millisecond.
        let left = PollTimeout::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(uevents.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(None),
            Ok(_) => changed = drain(uevents, is_of_disk)?,
            Err(Errno::EINTR) => changed = false,
            Err(error) => return Err(error.into()),
        }
    }
}

fn open(name: Option<String>, options: &OpenOptions) -> io::Result<Option<(String, File)>> {
    let Some(name) = name else { return Ok(None) };
    match options.open(format!("/dev/{name}")) {
        Ok(device) => Ok(Some((name, device))),
        // A device is listed shortly before it can be opened. Its uevent follows.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Name and serial of every block device that has a serial.
fn serials() -> io::Result<Vec<(String, String)>> {
    let mut serials = Vec::new();
    for device in fs::read_dir(DEVICES)? {
        let name = device?.file_name().to_string_lossy().into_owned();
        serials.extend(serial(&Path::new(DEVICES).join(&name))?.map(|serial| (name, serial)));
    }
    Ok(serials)
}

/// The serial of the device with this folder. Partitions and loop devices have none.
fn serial(device: &Path) -> io::Result<Option<String>> {
    for (file, header) in SERIALS {
        match fs::read(device.join(file)) {
            Ok(bytes) => {
                let serial = String::from_utf8_lossy(bytes.get(header..).unwrap_or_default());
                return Ok(Some(serial.trim_matches(['\0', ' ', '\n']).to_owned()));
            }
            // A SCSI device without the page has an empty file that cannot be read, and a device may disappear during the
            // search.
            Err(error) if error.kind() == ErrorKind::NotFound || is_without(&error) => {}
            Err(error) => {
                let what = format!("read {}: {error}", device.join(file).display());
                return Err(io::Error::new(error.kind(), what));
            }
        }
    }
    Ok(None)
}

fn is_without(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL | libc::ENXIO | libc::ENOTDIR))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_late_device_is_found_by_its_uevent() {
        let (kernel, uevents) = UnixDatagram::pair().unwrap();
        let uevents = OwnedFd::from(uevents);
        let mut searches = 0;
        let found = wait(&uevents, Duration::from_secs(60), || {
            searches += 1;
            // Two events, each after a search without a result.
            let event = b"add@/devices/x/0:0:7:0/block/sdb\0ACTION=add\0";
            let sent = if searches < 3 { kernel.send(event).map(drop) } else { Ok(()) };
            sent.map(|()| (searches == 3).then_some("vdb"))
        });
        assert_eq!((found.unwrap(), searches), (Some("vdb"), 3));
    }

    #[test]
    fn a_missing_device_is_awaited_until_the_deadline_and_sought_after_events_of_disks_only() {
        let (kernel, uevents) = UnixDatagram::pair().unwrap();
        let uevents = OwnedFd::from(uevents);
        for event in
            [&b"add@/devices/x/0:0:7:0\0SUBSYSTEM=block/\0"[..], b"add@/devices/virtual/bdi/8:0", b"", b"\0/block/"]
        {
            kernel.send(event).unwrap();
        }
        kernel.send(b"add@/devices/virtual/block/dm-0").unwrap();
        let (began, deadline) = (Instant::now(), Duration::from_millis(50));
        let mut searches = 0;
        let found = wait(&uevents, deadline, || {
            searches += 1;
            Ok(None::<()>)
        });
        assert_eq!((found.unwrap(), searches), (None, 2));
        assert!(began.elapsed() >= deadline);
    }

    #[test]
    fn serials_are_those_of_virtio_and_scsi_disks() {
        let devices = tempfile::tempdir().unwrap();
        let table: [(&str, &[u8], Option<&str>); 4] = [
            ("vda/serial", b"husk-extras\n", Some("husk-extras")),
            ("sda/device/vpd_pg80", b"\0\x80\0\x08volume-1", Some("volume-1")),
            ("sdb/device/vpd_pg80", b"\0\x80", Some("")),
            ("loop0/size", b"8", None),
        ];
        for (file, bytes, expected) in table {
            let file = devices.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, bytes).unwrap();
            let device = devices.path().join(file.strip_prefix(devices.path()).unwrap().iter().next().unwrap());
            assert_eq!(serial(&device).unwrap().as_deref(), expected, "{file:?}");
        }
    }

    #[test]
    fn a_failed_search_ends_the_wait_with_its_error() {
        let (_kernel, uevents) = UnixDatagram::pair().unwrap();
        let failed = wait::<()>(&uevents.into(), Duration::from_secs(60), || Err(io::Error::other("why")));
        assert_eq!(failed.unwrap_err().to_string(), "why");
    }
}
