//! Reports blocks of verified disks that are not what their hash tree says. The kernel fails the reads, and sends a uevent
//! for each of the first hundred of a device (DM_VERITY_MAX_CORRUPTED_ERRS in drivers/md/dm-verity-target.c).

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::fd::watch_fd;
use crate::uevents::subscribe;

/// A uevent's most bytes (UEVENT_BUFFER_SIZE), with its header.
const LONGEST: usize = 4096;
/// The variable with the kind of the block, 0 for data and 1 for hashes, and its number.
const BLOCK: &str = "DM_VERITY_ERR_BLOCK_NR=";
const PATH: &str = "DEVPATH=";

/// Starts to report, once. Call it before a device can be read, in a task of the runtime. A failure is logged: the kernel
/// enforces the hashes, whoever listens.
pub(super) fn watch() {
    static WATCHED: OnceLock<()> = OnceLock::new();
    WATCHED.get_or_init(|| match subscribe().and_then(|events| Ok(watch_fd(events, Interest::READABLE)?)) {
        Ok(events) => drop(tokio::spawn(report(events))),
        Err(error) => tracing::error!(%error, "failed to subscribe to corrupt blocks of verified disks"),
    });
}

async fn report(events: AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; LONGEST];
    loop {
        match events.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => return tracing::error!(%error, "corrupt blocks of verified disks are not reported any more"),
        }
        // After the clearing: an event that arrives from now on wakes again.
        loop {
            match recv(events.get_ref().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::EAGAIN) => break,
                Ok(length) => {
                    if let Some((device, block)) = corrupt(&buffer[..length]) {
                        let disk = disk(device);
                        tracing::error!(disk, block, "a block of a verified disk is corrupt: reading it fails");
                    }
                }
                Err(Errno::ENOBUFS) => tracing::warn!("the kernel has dropped events about devices"),
                Err(Errno::EINTR) => {}
                Err(error) => {
                    return tracing::error!(%error, "corrupt blocks of verified disks are not reported any more");
                }
            }
        }
    }
}

/// The device's name and the corrupt block that a uevent is about.
fn corrupt(event: &[u8]) -> Option<(&str, String)> {
    let variable =
        |name: &str| event.split(|byte| *byte == 0).find_map(|part| std::str::from_utf8(part).ok()?.strip_prefix(name));
    let (kind, number) = variable(BLOCK)?.split_once(',')?;
    let kind = if kind == "0" { "data" } else { "hash" };
    let device = variable(PATH)?.rsplit('/').next()?;
    Some((device, format!("{kind} block {number}")))
}

/// The serial of the disk below a device, which is the device's name in the device mapper.
fn disk(device: &str) -> String {
    let name = fs::read_to_string(format!("/sys/class/block/{device}/dm/name"));
    // The device may be gone by now.
    name.map_or_else(|_| device.to_owned(), |name| name.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_events_of_corrupt_blocks_are_reported() {
        let event = b"change@/devices/virtual/block/dm-3\0ACTION=change\0DEVPATH=/devices/virtual/block/dm-3\0\
            SUBSYSTEM=block\0DM_VERITY_ERR_BLOCK_NR=0,17\0SEQNUM=900\0";
        assert_eq!(corrupt(event), Some(("dm-3", "data block 17".to_owned())));
        let of_hash = String::from_utf8_lossy(event).replace("=0,17", "=1,2");
        assert_eq!(corrupt(of_hash.as_bytes()), Some(("dm-3", "hash block 2".to_owned())));
        for other in [&b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0"[..], b"", b"\xff\0DM_VERITY_ERR_BLOCK_NR=0"]
        {
            assert_eq!(corrupt(other), None);
        }
    }
}
