//! What plugging network cards and disks into a running machine has in common: numbers that are taken and given back, a
//! deadline for several commands, and what remains of an attempt that fails.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use serde_json::Value;
use tokio::time::Instant;

use super::qmp::{Qmp, QmpError};

/// Deadline for all commands that plug or unplug a device, and again for those that undo it. Unplugging a disk writes back
/// what the guest has written.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// The free numbers of devices, from 1: number 0 is a controller's.
#[derive(Debug)]
pub(super) struct Numbers(Mutex<BTreeSet<u32>>);

impl Numbers {
    pub(super) fn new(count: u32) -> Self {
        Self(Mutex::new((1..=count).collect()))
    }

    /// The lowest free number.
    pub(super) fn take(&self) -> Option<u32> {
        lock(&self.0).pop_first()
    }

    pub(super) fn give_back(&self, number: u32) {
        lock(&self.0).insert(number);
    }
}

/// Why a device is not plugged.
#[derive(Debug)]
pub(super) enum Failure {
    /// Its number is free.
    Undone(QmpError),
    /// QEMU may still plug the device, or has kept a part of it: its number must not be used again.
    Unknown(QmpError),
}

impl Failure {
    /// After QEMU has rejected `device`, and the commands before were to be undone.
    pub(super) fn after(rejected: QmpError, undone: Result<(), QmpError>, device: &'static str) -> Self {
        match undone {
            Ok(()) => Self::Undone(rejected),
            Err(error) => {
                tracing::warn!(device, error = %Chain(&error), "failed to undo what QEMU did before it rejected a device");
                Self::Unknown(rejected)
            }
        }
    }

    /// Gives the device's number back if it is free, and returns the error.
    pub(super) fn give_back(self, numbers: &Numbers, number: u32) -> QmpError {
        match self {
            Self::Undone(error) => {
                numbers.give_back(number);
                error
            }
            Self::Unknown(error) => error,
        }
    }
}

/// Commands with one deadline for all of them.
pub(super) struct Commands<'a> {
    qmp: &'a Qmp,
    until: Instant,
}

impl<'a> Commands<'a> {
    pub(super) fn new(qmp: &'a Qmp) -> Self {
        Self { qmp, until: Instant::now() + DEADLINE }
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.qmp.execute(command, arguments, self.left()).await.map(|_| ())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::io::{IoSliceMut, Seek, SeekFrom};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use tokio::io::{AsyncWriteExt, Interest};
    use tokio::net::UnixStream;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A command that QEMU received: its name, its arguments, and the length of the file whose descriptor came with it.
    pub(in crate::vmm::factory::qemu) type Received = (String, Value, Option<u64>);

    /// Plays QEMU: accepts all commands but `rejected`, and returns what was received: each command's name, its
    /// arguments, and the length of the file whose descriptor came with it.
    async fn play(mut socket: UnixStream, rejected: &'static str) -> Vec<Received> {
        let mut received = Vec::new();
        socket.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        loop {
            let mut line = vec![0; 4096];
            let (length, fd) = socket
                .async_io(Interest::READABLE, || {
                    let mut space = cmsg_space!([i32; 1]);
                    let mut data = [IoSliceMut::new(&mut line)];
                    let message = recvmsg::<()>(socket.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::empty())?;
                    let fd = message.cmsgs()?.find_map(|message| match message {
                        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                        _ => None,
                    });
                    Ok((message.bytes, fd))
                })
                .await
                .unwrap();
            if length == 0 {
                return received;
            }
            let command: Value = serde_json::from_slice(&line[..length]).unwrap();
            let name = command["execute"].as_str().unwrap().to_owned();
            // SAFETY: the descriptor has just been received, and nothing else owns it.
            let length = fd.map(|fd| unsafe { File::from_raw_fd(fd) }.seek(SeekFrom::End(0)).unwrap());
            let reply = if name == rejected {
                r#""error": {"class": "GenericError", "desc": "no"}"#
            } else {
                r#""return": {}"#
            };
            socket.write_all(format!("{{{reply}, \"id\": {}}}\n", command["id"]).as_bytes()).await.unwrap();
            received.push((name, command["arguments"].clone(), length));
        }
    }

    pub(in crate::vmm::factory::qemu) fn file(length: u64) -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file.into()
    }

    /// Runs `talk` with a QEMU that rejects the command `rejected`. Returns its result, and what QEMU received.
    pub(in crate::vmm::factory::qemu) async fn with_qemu<T>(
        rejected: &'static str,
        talk: impl AsyncFnOnce(&Qmp) -> T,
    ) -> (T, Vec<Received>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, rejected));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        let result = talk(&qmp).await;
        drop(qmp);
        let mut received = qemu.await.unwrap();
        // The handshake.
        received.remove(0);
        (result, received)
    }

    /// QMP of a QEMU that has ended.
    pub(in crate::vmm::factory::qemu) async fn unanswered() -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, ""));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        qemu.abort();
        assert!(qemu.await.is_err());
        qmp
    }

    /// Asserts that an attempt failed with the rejected command, and that QEMU received `undone` after it.
    pub(in crate::vmm::factory::qemu) fn expect_undone(
        rejected: &str,
        result: Result<(), Failure>,
        received: &[Received],
        undone: &[&str],
    ) {
        let Err(Failure::Undone(error)) = result else { panic!("{rejected}: {result:?}") };
        assert_eq!(error.to_string(), format!("{rejected}: GenericError: no"));
        let at = received.iter().position(|(name, ..)| name == rejected).unwrap();
        let after: Vec<&str> = received[at + 1..].iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(after, undone, "{rejected}");
    }

    #[test]
    fn the_lowest_free_number_is_used_and_a_number_that_was_given_back_again() {
        let numbers = Numbers::new(2);
        assert_eq!((numbers.take(), numbers.take(), numbers.take()), (Some(1), Some(2), None));
        numbers.give_back(1);
        assert_eq!((numbers.take(), numbers.take()), (Some(1), None));
        let numbers = Numbers::new(4);
        assert_eq!((numbers.take(), numbers.take(), numbers.take()), (Some(1), Some(2), Some(3)));
        numbers.give_back(2);
        assert_eq!((numbers.take(), numbers.take()), (Some(2), Some(4)));
    }

    #[test]
    fn a_number_is_free_only_if_qemu_has_undone_everything() {
        for (failure, free) in [
            (Failure::after(QmpError::Closed, Ok(()), "a disk"), Some(1)),
            (Failure::after(QmpError::Closed, Err(QmpError::Closed), "a disk"), None),
        ] {
            let numbers = Numbers::new(1);
            let number = numbers.take().unwrap();
            assert!(matches!(failure.give_back(&numbers, number), QmpError::Closed));
            assert_eq!(numbers.take(), free);
        }
    }
}
