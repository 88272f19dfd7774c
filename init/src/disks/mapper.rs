//! Devices of the kernel's device mapper, over its ioctls (include/uapi/linux/dm-ioctl.h in the kernel's source).

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use zeroize::Zeroizing;

/// The device that takes commands.
const CONTROL: &str = "/dev/mapper/control";
/// DM_IOCTL.
const IOCTL: u64 = 0xfd;
/// DM_VERSION_MAJOR: the interface. The kernel accepts any minor version up to its own.
const VERSION: u32 = 4;
/// The size of struct dm_ioctl, and where what follows it begins.
const HEADER: usize = 312;
/// The size of struct dm_target_spec.
const TARGET: usize = 40;
/// Fields of struct dm_ioctl.
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEV: usize = 40;
const NAME: usize = 48;
/// DM_NAME_LEN, with the final zero.
const NAME_MAX: usize = 128;

/// DM_READONLY_FLAG.
const READ_ONLY: u32 = 1;
/// DM_DEFERRED_REMOVE.
const DEFERRED: u32 = 1 << 17;
/// DM_SECURE_DATA_FLAG: the kernel wipes its copies of the command.
const SECURE: u32 = 1 << 15;

/// A command, by its number.
#[derive(Clone, Copy, Debug)]
enum Command {
    /// DM_DEV_CREATE
    Create = 3,
    /// DM_DEV_REMOVE
    Remove = 4,
    /// DM_DEV_SUSPEND, which resumes without DM_SUSPEND_FLAG.
    Resume = 6,
    /// DM_TABLE_LOAD
    Load = 9,
}

/// What a device consists of: one target from its beginning to its end.
pub(super) struct Target {
    /// `verity` or `crypt`.
    pub(super) kind: &'static str,
    /// Of 512 bytes.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// What the target's documentation says. May contain a key.
    pub(super) parameters: Zeroizing<String>,
}

/// Without the parameters, which may contain a key.
impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, sectors, read_only, parameters: _ } = self;
        write!(f, "{kind} with {sectors} sectors, read-only: {read_only}")
    }
}

/// A device, which exists until it is removed.
#[derive(Debug)]
pub(super) struct Mapped {
    name: String,
    /// The device's minor number, which its path has.
    minor: u32,
}

impl Mapped {
    /// Makes the device `name`. A failure leaves nothing behind.
    ///
    /// # Errors
    /// Those of the kernel, which has logged why.
    pub(super) fn create(name: &str, target: &Target) -> io::Result<Self> {
        let failed = |what: &str, error: io::Error| {
            io::Error::new(error.kind(), format!("{what} the {} device {name}: {error}", target.kind))
        };
        let dev = control(Command::Create, name, 0, None).map_err(|error| failed("create", error))?;
        let mapped = Self { name: name.to_owned(), minor: minor(dev) };
        let flags = if target.read_only { READ_ONLY } else { 0 } | SECURE;
        let loaded = control(Command::Load, name, flags, Some(target)).map_err(|error| failed("load", error));
        let resumed =
            loaded.and_then(|_| control(Command::Resume, name, 0, None).map_err(|error| failed("start", error)));
        match resumed {
            Ok(_) => Ok(mapped),
            Err(error) => {
                if let Err(error) = mapped.remove() {
                    tracing::error!(name, %error, "failed to remove an incomplete device");
                }
                Err(error)
            }
        }
    }

    /// The device's path.
    pub(super) fn path(&self) -> String {
        format!("/dev/dm-{}", self.minor)
    }

    /// Removes the device, and its key from the kernel's memory. Succeeds if it does not exist.
    ///
    /// # Errors
    /// EBUSY while something uses it.
    pub(super) fn remove(&self) -> io::Result<()> {
        self.remove_with(0)
    }

    /// Has the kernel remove the device when nothing uses it any more.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(super) fn remove_later(&self) -> io::Result<()> {
        self.remove_with(DEFERRED)
    }

    fn remove_with(&self, flags: u32) -> io::Result<()> {
        match control(Command::Remove, &self.name, flags, None) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            other => other.map(drop),
        }
    }
}

/// Executes a command and returns the device's number in the kernel's encoding.
fn control(command: Command, name: &str, flags: u32, target: Option<&Target>) -> io::Result<u64> {
    let mut buffer = message(name, flags, target)?;
    let control = File::options().read(true).write(true).open(CONTROL)?;
    // _IOWR(DM_IOCTL, command, struct dm_ioctl) in asm-generic/ioctl.h.
    let request = (3 << 30) | ((HEADER as u64) << 16) | (IOCTL << 8) | command as u64;
    // SAFETY: the kernel reads and writes the header and what follows it, as much as its data_size says, which is the
    // buffer's length. The buffer outlives the call.
    Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), request as _, buffer.as_mut_ptr()) })?;
    let mut dev = [0; 8];
    dev.copy_from_slice(&buffer[DEV..DEV + 8]);
    Ok(u64::from_ne_bytes(dev))
}

/// A command's message: struct dm_ioctl, and for a table struct dm_target_spec with its parameters.
fn message(name: &str, flags: u32, target: Option<&Target>) -> io::Result<Zeroizing<Vec<u8>>> {
    if name.is_empty() || name.len() >= NAME_MAX || name.contains(['/', '\0']) {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("{name:?} cannot be the name of a device")));
    }
    // With the final zero, and so long that a next target would be aligned.
    let parameters = target.map_or(0, |target| (target.parameters.len() + 1).next_multiple_of(8));
    let length = HEADER + target.map_or(0, |_| TARGET + parameters);
    // Allocated once: a growing buffer would leave copies of a key behind.
    let mut buffer = Zeroizing::new(vec![0; length]);
    let size = u32::try_from(length).map_err(io::Error::other)?;
    put(&mut buffer, 0, &VERSION.to_ne_bytes());
    put(&mut buffer, DATA_SIZE, &size.to_ne_bytes());
    put(&mut buffer, DATA_START, &(HEADER as u32).to_ne_bytes());
    put(&mut buffer, FLAGS, &flags.to_ne_bytes());
    put(&mut buffer, NAME, name.as_bytes());
    if let Some(target) = target {
        put(&mut buffer, TARGET_COUNT, &1_u32.to_ne_bytes());
        // The first sector is 0, and so is the status.
        put(&mut buffer, HEADER + 8, &target.sectors.to_ne_bytes());
        let next = (TARGET + parameters) as u32;
        put(&mut buffer, HEADER + 20, &next.to_ne_bytes());
        put(&mut buffer, HEADER + 24, target.kind.as_bytes());
        put(&mut buffer, HEADER + TARGET, target.parameters.as_bytes());
    }
    Ok(buffer)
}

fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    buffer[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The minor number (new_encode_dev in linux/kdev_t.h).
fn minor(dev: u64) -> u32 {
    let dev = dev as u32;
    (dev & 0xff) | ((dev >> 12) & 0xf_ff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_follows_the_header() {
        let target = Target {
            kind: "verity",
            sectors: 0x1234,
            read_only: true,
            parameters: Zeroizing::new("1 8:0 8:0".to_owned()),
        };
        let bytes = message("layer-1", READ_ONLY | SECURE, Some(&target)).unwrap();
        let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((bytes.len(), number(0), number(4), number(12), number(16)), (312 + 40 + 16, 4, 0, 368, 312));
        assert_eq!((number(20), number(28)), (1, 0x8001));
        assert!(bytes[48..].starts_with(b"layer-1\0"));
        assert_eq!((number(312), number(320), number(328), number(332)), (0, 0x1234, 0, 56));
        assert!(bytes[336..].starts_with(b"verity\0") && bytes[352..].starts_with(b"1 8:0 8:0\0"));
        assert_eq!(message("layer-1", 0, None).unwrap().len(), 312);
        for name in ["", "a/b", "a\0b", &"x".repeat(128)] {
            assert!(message(name, 0, None).is_err(), "{name}");
        }
    }

    #[test]
    fn the_minor_number_is_on_both_sides_of_the_major_one() {
        assert_eq!((minor(0xfd03), minor(0x0010_fd02)), (3, 258));
    }
}
