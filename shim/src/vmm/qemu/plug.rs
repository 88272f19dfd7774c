//! Plugs network cards into a running machine.
//!
//! QEMU gets the descriptors of a card's tap over QMP, then the back end, then the card. Nothing tells the guest: it has no
//! driver for the bridge's hot-plug controller, and searches the bus when it needs a card that it does not have.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::mac::mac_text;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::args::PLUG_BUS;
use super::qmp::{Qmp, QmpError};

/// Deadline for all commands that plug a card, and again for those that undo it.
const DEADLINE: Duration = Duration::from_secs(10);

/// The free slots of the bridge. Number 0 is the hot-plug controller's.
#[derive(Debug)]
pub(super) struct Slots(Mutex<BTreeSet<usize>>);

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        Self(Mutex::new((1..=count).collect()))
    }

    pub(super) fn take(&self) -> Option<usize> {
        lock(&self.0).pop_first()
    }

    pub(super) fn give_back(&self, slot: usize) {
        lock(&self.0).insert(slot);
    }
}

/// A card that is to be plugged.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) mac: [u8; 6],
    /// The tap's descriptors, one for each pair of queues.
    pub(super) taps: Vec<OwnedFd>,
    /// The kernel's vhost-net device, as often as there are taps; empty if QEMU itself moves the packets.
    pub(super) vhost: Vec<OwnedFd>,
}

/// Why a card is not plugged.
#[derive(Debug)]
pub(super) enum Failure {
    /// The slot is free.
    Undone(QmpError),
    /// QEMU may still plug the card, or has kept a part of it: the slot must not be used again.
    Unknown(QmpError),
}

/// Plugs a card into a slot.
pub(super) async fn plug(qmp: &Qmp, slot: usize, card: &Card) -> Result<(), Failure> {
    let (taps, vhost) = (names(slot, "tap", &card.taps), names(slot, "vhost", &card.vhost));
    let commands = Commands::new(qmp);
    let plugged = async {
        for (name, fd) in taps.iter().zip(&card.taps).chain(vhost.iter().zip(&card.vhost)) {
            qmp.give(name, fd.as_fd(), commands.left()).await?;
        }
        commands.execute("netdev_add", netdev(slot, &taps, &vhost)).await?;
        commands.execute("device_add", device(slot, card)).await
    };
    let failed = match plugged.await {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let QmpError::Rejected { command, .. } = &failed else { return Err(Failure::Unknown(failed)) };
    let commands = Commands::new(qmp);
    let undone = if command == "device_add" {
        commands.execute("netdev_del", json!({"id": id(slot)})).await
    } else {
        close(&commands, taps.iter().chain(&vhost)).await
    };
    match undone {
        Ok(()) => Err(Failure::Undone(failed)),
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "failed to undo a network card that QEMU has rejected");
            Err(Failure::Unknown(failed))
        }
    }
}

/// Closes the descriptors that QEMU has got and nothing uses.
async fn close(commands: &Commands<'_>, names: impl Iterator<Item = &String>) -> Result<(), QmpError> {
    for name in names {
        match commands.execute("closefd", json!({"fdname": name})).await {
            // QEMU did not get it, or the back end has taken it.
            Err(QmpError::Rejected { .. }) => {}
            other => other?,
        }
    }
    Ok(())
}

/// Commands with one deadline for all of them.
struct Commands<'a> {
    qmp: &'a Qmp,
    until: Instant,
}

impl<'a> Commands<'a> {
    fn new(qmp: &'a Qmp) -> Self {
        Self { qmp, until: Instant::now() + DEADLINE }
    }

    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    async fn execute(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.qmp.execute(command, arguments, self.left()).await.map(|_| ())
    }
}

fn id(slot: usize) -> String {
    format!("{PLUG_BUS}{slot}")
}

/// The names under which QEMU gets descriptors.
fn names(slot: usize, kind: &str, fds: &[OwnedFd]) -> Vec<String> {
    (0..fds.len()).map(|number| format!("{}-{kind}{number}", id(slot))).collect()
}

fn netdev(slot: usize, taps: &[String], vhost: &[String]) -> Value {
    let mut netdev = json!({"type": "tap", "id": id(slot), "fds": taps.join(":"), "vhost": !vhost.is_empty()});
    if !vhost.is_empty() {
        netdev["vhostfds"] = vhost.join(":").into();
    }
    netdev
}

fn device(slot: usize, card: &Card) -> Value {
    let mut device = json!({
        "driver": "virtio-net-pci", "id": format!("{}-card", id(slot)), "netdev": id(slot), "mac": mac_text(&card.mac),
        // The bus would choose slot 0 itself. Without an option ROM, as the other cards.
        "bus": PLUG_BUS, "addr": format!("{slot:#x}"), "romfile": "",
    });
    if card.taps.len() > 1 {
        device["mq"] = true.into();
    }
    device
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::io::{IoSliceMut, Seek, SeekFrom};
    use std::os::fd::{AsRawFd, FromRawFd};

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use tokio::io::{AsyncWriteExt, Interest};
    use tokio::net::UnixStream;

    use super::*;

    pub(in crate::vmm::factory::qemu) const SECOND: Duration = Duration::from_secs(1);

    /// Plays QEMU: accepts all commands but `rejected`, and returns what was received: each command's name, its
    /// arguments, and the length of the file whose descriptor came with it.
    pub(in crate::vmm::factory::qemu) async fn play(
        mut socket: UnixStream,
        rejected: &'static str,
    ) -> Vec<(String, Value, Option<u64>)> {
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

    async fn plugged(card: Card, rejected: &'static str) -> (Result<(), Failure>, Vec<(String, Value, Option<u64>)>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, rejected));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        let result = plug(&qmp, 3, &card).await;
        drop(qmp);
        let mut received = qemu.await.unwrap();
        received.remove(0);
        (result, received)
    }

    #[tokio::test]
    async fn a_card_gets_the_descriptors_of_its_tap() {
        let card = Card { mac: [2, 0, 0, 0, 0, 7], taps: vec![file(1), file(2)], vhost: vec![file(3), file(4)] };
        let (result, received) = plugged(card, "").await;
        assert!(result.is_ok(), "{result:?}");
        let given: Vec<_> = received[..4].iter().map(|(_, name, fd)| (name["fdname"].as_str().unwrap(), *fd)).collect();
        let expected = ["plug3-tap0", "plug3-tap1", "plug3-vhost0", "plug3-vhost1"];
        assert_eq!(given, expected.into_iter().zip((1..).map(Some)).collect::<Vec<_>>());
        let netdev = json!({
            "type": "tap", "id": "plug3", "fds": "plug3-tap0:plug3-tap1",
            "vhost": true, "vhostfds": "plug3-vhost0:plug3-vhost1",
        });
        assert_eq!(received[4], ("netdev_add".into(), netdev, None));
        let device = json!({
            "driver": "virtio-net-pci", "id": "plug3-card", "netdev": "plug3", "mac": "02:00:00:00:00:07",
            "bus": "plug", "addr": "0x3", "romfile": "", "mq": true,
        });
        assert_eq!(received[5], ("device_add".into(), device, None));
    }

    #[tokio::test]
    async fn a_card_that_qemu_rejects_leaves_nothing_there() {
        for (rejected, undone) in
            [("getfd", &["closefd"][..]), ("netdev_add", &["closefd"]), ("device_add", &["netdev_del"])]
        {
            let card = Card { mac: [2, 0, 0, 0, 0, 7], taps: vec![file(1)], vhost: Vec::new() };
            let (result, received) = plugged(card, rejected).await;
            let Err(Failure::Undone(error)) = result else { panic!("{rejected}: {result:?}") };
            assert_eq!(error.to_string(), format!("{rejected}: GenericError: no"));
            let at = received.iter().position(|(name, ..)| name == rejected).unwrap();
            let after: Vec<&str> = received[at + 1..].iter().map(|(name, ..)| name.as_str()).collect();
            assert_eq!(after, undone, "{rejected}");
        }
    }

    #[tokio::test]
    async fn a_slot_is_used_again_only_if_qemu_has_freed_it() {
        let slots = Slots::new(2);
        assert_eq!((slots.take(), slots.take(), slots.take()), (Some(1), Some(2), None));
        slots.give_back(1);
        assert_eq!((slots.take(), slots.take()), (Some(1), None));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qemu = tokio::spawn(play(theirs, ""));
        let (qmp, _events) = Qmp::handshake(ours, SECOND).await.unwrap();
        qemu.abort();
        assert!(qemu.await.is_err());
        let card = Card { mac: [2, 0, 0, 0, 0, 7], taps: vec![file(1)], vhost: Vec::new() };
        assert!(matches!(plug(&qmp, 1, &card).await, Err(Failure::Unknown(_))));
    }
}
