//! Plugs network cards into a running machine.
//!
//! QEMU gets the descriptors of a card's tap over QMP, then the back end, then the card. Nothing tells the guest: it has no
//! driver for the bridge's hot-plug controller, and searches the bus when it needs a card that it does not have.

use std::os::fd::{AsFd, OwnedFd};

use husk_protos::mac::mac_text;
use serde_json::{Value, json};

use super::args::PLUG_BUS;
use super::hotplug::{Commands, Failure};
use super::qmp::{Qmp, QmpError};

/// A card that is to be plugged.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) mac: [u8; 6],
    /// The tap's descriptors, one for each pair of queues.
    pub(super) taps: Vec<OwnedFd>,
    /// The kernel's vhost-net device, as often as there are taps; empty if QEMU itself moves the packets.
    pub(super) vhost: Vec<OwnedFd>,
}

/// Plugs a card into a slot.
pub(super) async fn plug(qmp: &Qmp, slot: u32, card: &Card) -> Result<(), Failure> {
    let (taps, vhost) = (names(slot, "tap", &card.taps), names(slot, "vhost", &card.vhost));
    let commands = Commands::new(qmp);
    let plugged = async {
        for (name, fd) in taps.iter().zip(&card.taps).chain(vhost.iter().zip(&card.vhost)) {
            qmp.give(name, fd.as_fd(), commands.left()).await?;
        }
        commands.execute("netdev_add", netdev(slot, &taps, &vhost)).await?;
        commands.execute("device_add", device(slot, card)).await
    };
    let Err(failed) = plugged.await else { return Ok(()) };
    let QmpError::Rejected { command, .. } = &failed else { return Err(Failure::Unknown(failed)) };
    let commands = Commands::new(qmp);
    let undone = if command == "device_add" {
        commands.execute("netdev_del", json!({"id": id(slot)})).await
    } else {
        close(&commands, taps.iter().chain(&vhost)).await
    };
    Err(Failure::after(failed, undone, "a network card"))
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

fn id(slot: u32) -> String {
    format!("{PLUG_BUS}{slot}")
}

/// The names under which QEMU gets descriptors.
fn names(slot: u32, kind: &str, fds: &[OwnedFd]) -> Vec<String> {
    (0..fds.len()).map(|number| format!("{}-{kind}{number}", id(slot))).collect()
}

fn netdev(slot: u32, taps: &[String], vhost: &[String]) -> Value {
    let mut netdev = json!({"type": "tap", "id": id(slot), "fds": taps.join(":"), "vhost": !vhost.is_empty()});
    if !vhost.is_empty() {
        netdev["vhostfds"] = vhost.join(":").into();
    }
    netdev
}

fn device(slot: u32, card: &Card) -> Value {
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
mod tests {
    use super::super::hotplug::tests::{Received, expect_undone, file, unanswered, with_qemu};
    use super::*;

    async fn plugged(card: Card, rejected: &'static str) -> (Result<(), Failure>, Vec<Received>) {
        with_qemu(rejected, async |qmp| plug(qmp, 3, &card).await).await
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
            expect_undone(rejected, result, &received, undone);
        }
    }

    #[tokio::test]
    async fn a_card_may_be_there_if_qemu_does_not_answer() {
        let qmp = unanswered().await;
        let card = Card { mac: [2, 0, 0, 0, 0, 7], taps: vec![file(1)], vhost: Vec::new() };
        assert!(matches!(plug(&qmp, 1, &card).await, Err(Failure::Unknown(_))));
    }
}
