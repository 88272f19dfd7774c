//! Unix sockets of other programs of the host. Their paths may lead through folders that other users write to, so no
//! symbolic link is followed, and the file is checked after it was opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::sockopt::SendTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};

/// A socket's owner and permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A socket's file, opened without access to the socket.
#[derive(Debug)]
pub(crate) struct SocketFile(File);

impl SocketFile {
    /// Opens a socket's file. `path` must contain no symbolic link.
    ///
    /// # Errors
    /// The file does not exist, is reached through a symbolic link, or is no socket.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let file = File::from(openat2(AT_FDCWD, path, how)?);
        if !file.metadata()?.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a socket"));
        }
        Ok(Self(file))
    }

    pub(crate) fn access(&self) -> io::Result<Access> {
        let metadata = self.0.metadata()?;
        Ok(Access { mode: metadata.mode() & 0o777, uid: metadata.uid(), gid: metadata.gid() })
    }

    /// Connects to the program that listens. Blocks until it has room for the connection.
    ///
    /// # Errors
    /// `ConnectionRefused` if no program listens, EPROTOTYPE if it expects datagrams or packets, EAGAIN if it had no
    /// room in time.
    pub(crate) fn connect(&self, limit: Duration) -> io::Result<UnixStream> {
        let stream = new_socket(SockType::Stream)?;
        let limit = TimeVal::milliseconds(i64::try_from(limit.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&stream, SendTimeout, &limit)?;
        connect(stream.as_raw_fd(), &self.address()?)?;
        setsockopt(&stream, SendTimeout, &TimeVal::milliseconds(0))?;
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// The kind of a socket that does not carry byte streams. A connection with another kind than the listener's fails
    /// without any effect on the program that listens.
    ///
    /// # Errors
    /// The system calls fail.
    pub(crate) fn other_kind(&self) -> io::Result<Option<&'static str>> {
        for (kind, name) in [(SockType::Datagram, "datagrams"), (SockType::SeqPacket, "packets")] {
            let probe = new_socket(kind)?;
            match connect(probe.as_raw_fd(), &self.address()?) {
                Ok(()) => return Ok(Some(name)),
                // Another kind, or nobody listens.
                Err(Errno::EPROTOTYPE | Errno::ECONNREFUSED) => {}
                // The right kind without room.
                Err(Errno::EAGAIN) => return Ok(Some(name)),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(None)
    }

    /// Leads to the opened file, whatever its path is now, and is never too long.
    fn address(&self) -> io::Result<UnixAddr> {
        Ok(UnixAddr::new(format!("/proc/self/fd/{}", self.0.as_raw_fd()).as_str())?)
    }
}

fn new_socket(kind: SockType) -> io::Result<OwnedFd> {
    let flags = if kind == SockType::Stream {
        SockFlag::SOCK_CLOEXEC
    } else {
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK
    };
    Ok(socket(AddressFamily::Unix, kind, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[test]
    fn a_socket_is_reached_at_a_long_path_but_not_through_links() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (short, long) = (folder.path().join("s"), deep.join("s"));
        let listener = UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, &long).unwrap();
        let file = SocketFile::open(&long).unwrap();
        assert_eq!(file.other_kind().unwrap(), None);
        let mut stream = file.connect(LIMIT).unwrap();
        drop(listener.accept().unwrap());
        stream.set_nonblocking(false).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);

        symlink(&long, folder.path().join("link")).unwrap();
        symlink(&deep, folder.path().join("folder")).unwrap();
        for path in ["link", "folder/s"] {
            let error = SocketFile::open(&folder.path().join(path)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{path}");
        }
        assert_eq!(SocketFile::open(&deep).unwrap_err().to_string(), "is not a socket");
        drop(listener);
        assert_eq!(file.connect(LIMIT).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(file.other_kind().unwrap(), None);
    }

    #[test]
    fn sockets_for_datagrams_and_packets_are_recognized() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("datagrams");
        let _datagrams = UnixDatagram::bind(&path).unwrap();
        assert_eq!(SocketFile::open(&path).unwrap().other_kind().unwrap(), Some("datagrams"));
        let path = folder.path().join("packets");
        let packets = new_socket(SockType::SeqPacket).unwrap();
        bind(packets.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&packets, Backlog::new(1).unwrap()).unwrap();
        let file = SocketFile::open(&path).unwrap();
        assert_eq!(file.other_kind().unwrap(), Some("packets"));
        assert_eq!(file.connect(LIMIT).unwrap_err().raw_os_error(), Some(libc::EPROTOTYPE));
    }

    #[test]
    fn a_listener_without_room_is_not_waited_for_forever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full");
        let full = new_socket(SockType::Stream).unwrap();
        bind(full.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&full, Backlog::new(0).unwrap()).unwrap();
        let file = SocketFile::open(&path).unwrap();
        let _waiting = file.connect(LIMIT).unwrap();
        assert_eq!(file.connect(LIMIT).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    }
}
