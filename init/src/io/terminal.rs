//! A process's terminal: PID 1's end of its pty, the pty's size, and whose it is.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::{posix_openpt, unlockpt};
use nix::unistd::Uid;
use serde::Deserialize;

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// What a spec says of a process's terminal. Only what PID 1 needs of it; the worker reads and checks the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its size at the start.
    pub size: Option<Size>,
    /// Its owner, as the guest counts users.
    pub owner: u32,
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

impl Wish {
    /// Of a container's `config.json`, and, for an exec, of its process's own JSON.
    ///
    /// # Errors
    /// When one of them cannot be understood.
    pub fn read(config: &[u8], exec: Option<&[u8]>) -> serde_json::Result<Self> {
        let config: Config = serde_json::from_slice(config)?;
        let process = match exec {
            Some(exec) => serde_json::from_slice(exec)?,
            None => config.process,
        };
        let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let size = process.console_size.map(|size| Size { height: short(size.height), width: short(size.width) });
        let uid = process.user.uid;
        let mapped = config.linux.uid_mappings.iter().find_map(|range| {
            let offset = uid.checked_sub(range.container_id).filter(|offset| *offset < range.size)?;
            range.host_id.checked_add(offset)
        });
        Ok(Self { size, owner: mapped.unwrap_or(uid) })
    }
}

/// The terminal of one process, which has it from its start on.
#[derive(Debug, Default)]
pub struct Terminal(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last size that was asked for, while there is no pty yet.
    size: Option<Size>,
    /// Kept until the process is forgotten: the last copy's end hangs up whoever has the terminal still.
    master: Option<OwnedFd>,
}

impl Terminal {
    /// Takes the master of the process's pty, and makes the terminal as it is wished.
    ///
    /// # Errors
    /// When the pty does not take it.
    pub fn open(&self, master: OwnedFd, wish: Wish) -> io::Result<()> {
        let mut state = self.state();
        // A size that a client has asked for meanwhile is newer than the spec's.
        if let Some(size) = state.size.or(wish.size) {
            set_size(&master, size)?;
        }
        if wish.owner != 0 {
            // Made by root on the process's behalf; it may want to open it by name.
            nix::unistd::fchown(peer(&master)?, Some(Uid::from_raw(wish.owner)), None)?;
        }
        state.master = Some(master);
        Ok(())
    }

    /// Changes the size; of a terminal that is still to come, when it comes.
    ///
    /// # Errors
    /// When the pty does not take it.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        let mut state = self.state();
        state.size = Some(size);
        state.master.as_ref().map_or(Ok(()), |master| set_size(master, size))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn set_size(master: &OwnedFd, size: Size) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) })?;
    Ok(())
}

/// A new pty: its master, and a process's end of it.
///
/// # Errors
/// When the descriptors or the ptys run out.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    unlockpt(&master)?;
    let master = OwnedFd::from(master);
    let peer = peer(&master)?;
    Ok((master, peer))
}

/// The process's end of a pty, without its path, which only the container's mount namespace knows.
fn peer(master: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER (ioctl_tty(2)) takes open(2)'s flags as its argument, and answers a new descriptor.
    let fd = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER as _, flags.bits()) })?;
    // SAFETY: the kernel has just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use nix::pty::openpty;

    use super::*;

    fn size_of(fd: &OwnedFd) -> (u16, u16) {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ writes one winsize, into a variable that outlives the call.
        Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ as _, &raw mut size) }).unwrap();
        (size.ws_row, size.ws_col)
    }

    #[test]
    fn the_newest_size_counts() {
        let (spec, asked) = (Size { height: 24, width: 80 }, Size { height: 50, width: 132 });
        let wish = Wish { size: Some(spec), owner: 0 };
        for (before, want) in [(None, (24, 80)), (Some(asked), (50, 132))] {
            let pty = openpty(None, None).unwrap();
            let terminal = Terminal::default();
            if let Some(size) = before {
                terminal.resize(size).unwrap();
            }
            terminal.open(pty.master, wish).unwrap();
            assert_eq!(size_of(&pty.slave), want);
            terminal.resize(Size { height: 1, width: 2 }).unwrap();
            assert_eq!(size_of(&pty.slave), (1, 2));
        }
    }

    #[test]
    fn what_a_spec_says_of_a_terminal() {
        let config = br#"{"process": {"user": {"uid": 7}, "consoleSize": {"height": 30, "width": 100}, "args": ["x"]},
            "linux": {"uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}]}}"#;
        let size = Some(Size { height: 30, width: 100 });
        let empty = &b"{}"[..];
        let cases = [
            (empty, None, Wish { size: None, owner: 0 }),
            (&config[..], None, Wish { size, owner: 100_007 }),
            (config, Some(&br#"{"user": {"uid": 70000}}"#[..]), Wish { size: None, owner: 70_000 }),
            (
                empty,
                Some(&br#"{"user": {"uid": 5}, "consoleSize": {"height": 70000, "width": 1}}"#[..]),
                Wish { size: Some(Size { height: u16::MAX, width: 1 }), owner: 5 },
            ),
        ];
        for (config, exec, want) in cases {
            assert_eq!(Wish::read(config, exec).unwrap(), want);
        }
    }
}
