//! What `start` gives to a waiting shim: the sandbox's name, and the listening socket that containerd will connect to.
//!
//! The message is the length of its text, with the socket as SCM_RIGHTS, and the text, JSON. The shim answers with one
//! byte once it serves the sandbox. The connection ends without it if the shim cannot.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use serde::{Deserialize, Serialize};

use super::members::CLAIMED;
use crate::host::socket;

/// Largest text.
const MAX_TEXT: usize = 64 * 1024;
/// The answer of a shim that serves.
const SERVES: u8 = b'y';

/// The sandbox that a waiting shim is to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The sandbox's id.
    pub(crate) sandbox: String,
    /// The bundle of its first container.
    pub(crate) bundle: PathBuf,
    /// The path of the listening socket.
    pub(crate) socket: PathBuf,
    /// containerd's TTRPC socket.
    pub(crate) ttrpc_address: String,
    /// Log at debug level.
    pub(crate) debug: bool,
}

/// Gives an identity to the claimed shim of the pool directory `dir`, and waits until it serves. Each step takes `limit`
/// at most.
///
/// # Errors
/// The shim does not take it, is gone, or takes too long. It may serve all the same, so the caller ends it.
pub(crate) fn give(dir: &Path, identity: &Identity, listener: &UnixListener, limit: Duration) -> io::Result<()> {
    let mut stream = socket::connect(dir, CLAIMED)?;
    stream.set_write_timeout(Some(limit))?;
    stream.set_read_timeout(Some(limit))?;
    let text = serde_json::to_vec(identity)?;
    let length = u32::try_from(text.len()).map_err(io::Error::other)?.to_le_bytes();
    let rights = [listener.as_raw_fd()];
    let parts = [IoSlice::new(&length)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &[ControlMessage::ScmRights(&rights)], MsgFlags::MSG_NOSIGNAL, None)?;
    stream.write_all(&text)?;
    let mut answer = [0];
    stream.read_exact(&mut answer).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => {
            let late = format!("the waiting shim has not answered within {} ms", limit.as_millis());
            io::Error::new(ErrorKind::TimedOut, late)
        }
        ErrorKind::UnexpectedEof => io::Error::new(ErrorKind::UnexpectedEof, "the waiting shim has given up or died"),
        _ => error,
    })?;
    if answer == [SERVES] { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidData, "unexpected answer")) }
}

/// Receives an identity from a process of root, within `limit` for each step. Blocks.
///
/// # Errors
/// The caller is not root, or its message is not one, or does not arrive in time.
pub(crate) fn receive(stream: UnixStream, limit: Duration) -> io::Result<(Identity, UnixListener, Confirmation)> {
    let invalid = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let peer = getsockopt(&stream, PeerCredentials)?;
    if peer.uid() != 0 {
        return Err(io::Error::new(ErrorKind::PermissionDenied, format!("user {} may not do that", peer.uid())));
    }
    let mut stream = stream;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut length = [0; 4];
    let (bytes, listener) = receive_with_socket(&stream, &mut length)?;
    let listener = listener.ok_or_else(|| invalid("no socket"))?;
    if bytes != length.len() {
        return Err(invalid("no length"));
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_TEXT {
        return Err(invalid("too long"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok((serde_json::from_slice(&text)?, UnixListener::from(listener), Confirmation(stream)))
}

fn receive_with_socket(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just installed these descriptors for this process, and nothing else owns them.
            received.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, received.pop()))
}

/// Where `start` waits for the answer. Dropped, it tells that the shim does not serve.
#[derive(Debug)]
pub(crate) struct Confirmation(UnixStream);

impl Confirmation {
    /// Tells `start` that the sandbox is served.
    ///
    /// # Errors
    /// `start` has given up.
    pub(crate) fn confirm(mut self) -> io::Result<()> {
        self.0.write_all(&[SERVES])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(5);

    fn identity() -> Identity {
        Identity {
            namespace: "ns".into(),
            sandbox: "s1".into(),
            bundle: "/b".into(),
            socket: "/s".into(),
            ttrpc_address: "/t".into(),
            debug: true,
        }
    }

    #[test]
    fn an_identity_arrives_with_its_socket_and_is_confirmed() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = socket::listen(dir.path(), CLAIMED).unwrap();
        waiting.set_nonblocking(false).unwrap();
        let path = dir.path().join("ttrpc.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::scope(|scope| {
            let given = scope.spawn(|| give(dir.path(), &identity(), &listener, SECOND));
            let (received, socket, confirmation) = receive(waiting.accept().unwrap().0, SECOND).unwrap();
            assert_eq!(received, identity());
            confirmation.confirm().unwrap();
            given.join().unwrap().unwrap();
            let _client = UnixStream::connect(&path).unwrap();
            socket.accept().unwrap();
        });
    }

    #[test]
    fn a_shim_that_dies_or_gets_no_message_is_no_handover() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = socket::listen(dir.path(), CLAIMED).unwrap();
        waiting.set_nonblocking(false).unwrap();
        let listener = UnixListener::bind(dir.path().join("ttrpc.sock")).unwrap();
        std::thread::scope(|scope| {
            let given = scope.spawn(|| give(dir.path(), &identity(), &listener, SECOND));
            drop(receive(waiting.accept().unwrap().0, SECOND).unwrap());
            assert_eq!(given.join().unwrap().unwrap_err().kind(), ErrorKind::UnexpectedEof);
        });
        let mut bad = UnixStream::connect(dir.path().join(CLAIMED)).unwrap();
        bad.write_all(b"abcd").unwrap();
        assert_eq!(receive(waiting.accept().unwrap().0, SECOND).unwrap_err().to_string(), "no socket");
        let silent = UnixStream::connect(dir.path().join(CLAIMED)).unwrap();
        assert!(receive(waiting.accept().unwrap().0, Duration::from_millis(10)).is_err());
        drop(silent);
    }
}
