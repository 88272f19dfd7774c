//! A process's terminal: the master of its pty, its size and its owner.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use husk_protos::lock::lock;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::{posix_openpt, unlockpt};
use nix::unistd::Uid;
use serde::Deserialize;

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) height: u16,
    pub(crate) width: u16,
}

/// A terminal as an OCI spec describes it. Contains only what PID 1 needs; the worker reads and validates the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TerminalSpec {
    /// Initial size.
    pub(crate) size: Option<Size>,
    /// The owner's UID in the guest's user namespace.
    pub(crate) owner: u32,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Process {
    console_size: Option<ConsoleSize>,
    user: User,
}

#[derive(Deserialize)]
struct ConsoleSize {
    height: u32,
    width: u32,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct User {
    uid: u32,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    process: Process,
    linux: Linux,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    uid_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

impl TerminalSpec {
    /// Reads a container's `config.json` and, for an exec, the JSON of its process.
    ///
    /// # Errors
    /// When one of them is invalid.
    pub(crate) fn read(config: &[u8], exec: Option<&[u8]>) -> serde_json::Result<Self> {
        let config: Config = serde_json::from_slice(config)?;
        let process = match exec {
            Some(exec) => serde_json::from_slice(exec)?,
            None => config.process,
        };
        let clamp = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let size = process.console_size.map(|size| Size { height: clamp(size.height), width: clamp(size.width) });
        let uid = process.user.uid;
        let mapped = config.linux.uid_mappings.iter().find_map(|range| {
            let offset = uid.checked_sub(range.container_id).filter(|offset| *offset < range.size)?;
            range.host_id.checked_add(offset)
        });
        Ok(Self { size, owner: mapped.unwrap_or(uid) })
    }
}

/// The terminal of one process. The pty is opened when the process is created.
#[derive(Debug, Default)]
pub(super) struct Terminal(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last size that a client has set.
    size: Option<Size>,
    /// Kept until the process is deleted: closing the last copy hangs up the processes that still have the terminal.
    master: Option<OwnedFd>,
}

impl Terminal {
    /// Takes the master of the process's pty, and sets its size and owner.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(super) fn open(&self, master: OwnedFd, spec: TerminalSpec) -> io::Result<()> {
        let mut state = self.state();
        // A size that a client has set in the meantime overrides the spec's.
        if let Some(size) = state.size.or(spec.size) {
            set_size(&master, size)?;
        }
        if spec.owner != 0 {
            // Root created the pty, and the process may want to open it by name.
            nix::unistd::fchown(peer(&master)?, Some(Uid::from_raw(spec.owner)), None)?;
        }
        state.master = Some(master);
        Ok(())
    }

    /// Sets the size now, or when the pty is opened.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(super) fn resize(&self, size: Size) -> io::Result<()> {
        let mut state = self.state();
        state.size = Some(size);
        state.master.as_ref().map_or(Ok(()), |master| set_size(master, size))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

fn set_size(master: &OwnedFd, size: Size) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) })?;
    Ok(())
}

/// Creates a pty. Returns its master and the process's end.
///
/// # Errors
/// When descriptors or ptys run out.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    unlockpt(&master)?;
    let master = OwnedFd::from(master);
    let peer = peer(&master)?;
    Ok((master, peer))
}

/// Opens the process's end of a pty. Without its path, which is valid only in the container's mount namespace.
fn peer(master: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER (ioctl_tty(2)) takes the flags of open(2) as its argument and returns a new descriptor.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER as _, flags.bits()) })?;
    // SAFETY: the kernel has just created the descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use nix::pty::openpty;

    use super::*;

    fn size_of(fd: &OwnedFd) -> (u16, u16) {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes one winsize to a variable that outlives the call.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ as _, &raw mut size) }).unwrap();
        (size.ws_row, size.ws_col)
    }

    #[test]
    fn the_most_recent_size_applies() {
        let (initial, resized) = (Size { height: 24, width: 80 }, Size { height: 50, width: 132 });
        let spec = TerminalSpec { size: Some(initial), owner: 0 };
        for (before, expected) in [(None, (24, 80)), (Some(resized), (50, 132))] {
            let pty = openpty(None, None).unwrap();
            let terminal = Terminal::default();
            if let Some(size) = before {
                terminal.resize(size).unwrap();
            }
            terminal.open(pty.master, spec).unwrap();
            assert_eq!(size_of(&pty.slave), expected);
            terminal.resize(Size { height: 1, width: 2 }).unwrap();
            assert_eq!(size_of(&pty.slave), (1, 2));
        }
    }

    #[test]
    fn size_and_owner_come_from_the_spec() {
        let config = br#"{"process": {"user": {"uid": 7}, "consoleSize": {"height": 30, "width": 100}, "args": ["x"]},
            "linux": {"uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}]}}"#;
        let size = Some(Size { height: 30, width: 100 });
        let empty = &b"{}"[..];
        let cases = [
            (empty, None, TerminalSpec { size: None, owner: 0 }),
            (&config[..], None, TerminalSpec { size, owner: 100_007 }),
            (config, Some(&br#"{"user": {"uid": 70000}}"#[..]), TerminalSpec { size: None, owner: 70_000 }),
            (
                empty,
                Some(&br#"{"user": {"uid": 5}, "consoleSize": {"height": 70000, "width": 1}}"#[..]),
                TerminalSpec { size: Some(Size { height: u16::MAX, width: 1 }), owner: 5 },
            ),
        ];
        for (config, exec, expected) in cases {
            assert_eq!(TerminalSpec::read(config, exec).unwrap(), expected);
        }
    }
}
