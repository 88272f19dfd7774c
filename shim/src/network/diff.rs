//! Which NICs change their links when a namespace's links change. Pure.

use super::link::Link;

/// What happens to a NIC. NICs and links are indexes of the lists that were compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NicChange {
    /// The NIC's link has left the namespace.
    Disconnect { nic: usize },
    /// A spare NIC gets a link.
    Connect { nic: usize, link: usize },
    /// The link has left and returned, which has removed its redirects, or they may be lost for another reason.
    Reconnect { nic: usize, link: usize },
    /// The link has another name, MAC, MTU or state.
    Update { nic: usize, link: usize },
}

/// The result of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Diff {
    /// In the order in which they have to be made.
    pub(super) changes: Vec<NicChange>,
    /// The links for which there is no NIC.
    pub(super) unconnected: Vec<usize>,
}

/// A NIC, for the comparison.
#[derive(Clone, Debug)]
pub(super) struct NicLink<'a> {
    /// The MAC that the machine gave to the NIC.
    pub(super) mac: [u8; 6],
    pub(super) link: Option<&'a Link>,
}

/// Compares the links of the NICs with those of the namespace. `lost` recognizes links whose redirects may be lost.
pub(super) fn diff(nics: &[NicLink<'_>], links: &[Link], lost: impl Fn(&Link) -> bool) -> Diff {
    let mut diff = Diff::default();
    let mut free: Vec<usize> = Vec::new();
    let mut kept = Vec::new();
    for (nic, connected) in nics.iter().enumerate() {
        let Some(connected) = connected.link else {
            free.push(nic);
            continue;
        };
        // The index is the link's identity: its name and MAC may change.
        let Some(link) = links.iter().position(|link| link.index == connected.index) else {
            diff.changes.push(NicChange::Disconnect { nic });
            free.push(nic);
            continue;
        };
        if lost(connected) {
            kept.push(NicChange::Reconnect { nic, link });
        } else if *connected != links[link] {
            kept.push(NicChange::Update { nic, link });
        }
    }
    diff.changes.extend(kept);
    let is_new = |link: &Link| nics.iter().all(|nic| nic.link.is_none_or(|connected| connected.index != link.index));
    let mut new: Vec<usize> = (0..links.len()).filter(|link| is_new(&links[*link])).collect();
    // A NIC that has the link's MAC from the start suits it best; the boot chooses the MACs so.
    let mut connections = Vec::new();
    new.retain(|&link| {
        let Some(at) = free.iter().position(|&nic| nics[nic].mac == links[link].mac) else { return true };
        connections.push((link, free.remove(at)));
        false
    });
    let mut free = free.into_iter();
    for link in new {
        match free.next() {
            Some(nic) => connections.push((link, nic)),
            None => diff.unconnected.push(link),
        }
    }
    connections.sort_unstable();
    diff.changes.extend(connections.into_iter().map(|(link, nic)| NicChange::Connect { nic, link }));
    diff
}

#[cfg(test)]
mod tests {
    use super::NicChange::*;
    use super::*;

    fn mac(last: u8) -> [u8; 6] {
        [2, 0, 0, 0, 0, last]
    }

    fn link(index: u32) -> Link {
        Link { index, name: format!("eth{index}"), mac: mac(u8::try_from(index).unwrap()), mtu: 1500, up: true }
    }

    fn compare(nics: &[(u8, Option<Link>)], links: &[Link], lost: &[u32]) -> (Vec<NicChange>, Vec<usize>) {
        let nics: Vec<_> = nics.iter().map(|(last, link)| NicLink { mac: mac(*last), link: link.as_ref() }).collect();
        let Diff { changes, unconnected } = diff(&nics, links, |link| lost.contains(&link.index));
        (changes, unconnected)
    }

    #[test]
    fn nics_follow_the_links() {
        type Case = (&'static str, Vec<(u8, Option<Link>)>, Vec<Link>, &'static [u32], Vec<NicChange>, Vec<usize>);
        let renamed = Link { name: "net1".into(), ..link(2) };
        let table: Vec<Case> = vec![
            ("nothing", vec![(2, Some(link(2))), (9, None)], vec![link(2)], &[], vec![], vec![]),
            ("no namespace's links and no NICs", vec![], vec![], &[], vec![], vec![]),
            (
                "new",
                vec![(2, Some(link(2))), (9, None)],
                vec![link(2), link(3)],
                &[],
                vec![Connect { nic: 1, link: 1 }],
                vec![],
            ),
            (
                "by the MAC if there is one",
                vec![(9, None), (3, None), (8, None)],
                vec![link(2), link(3)],
                &[],
                vec![Connect { nic: 0, link: 0 }, Connect { nic: 1, link: 1 }],
                vec![],
            ),
            (
                "more than NICs",
                vec![(2, Some(link(2))), (9, None)],
                vec![link(2), link(3), link(4)],
                &[],
                vec![Connect { nic: 1, link: 1 }],
                vec![2],
            ),
            ("gone", vec![(2, Some(link(2)))], vec![], &[], vec![Disconnect { nic: 0 }], vec![]),
            (
                "its NIC is free at once",
                vec![(2, Some(link(2)))],
                vec![link(5)],
                &[],
                vec![Disconnect { nic: 0 }, Connect { nic: 0, link: 0 }],
                vec![],
            ),
            ("renamed", vec![(2, Some(link(2)))], vec![renamed], &[], vec![Update { nic: 0, link: 0 }], vec![]),
            ("returned", vec![(2, Some(link(2)))], vec![link(2)], &[2], vec![Reconnect { nic: 0, link: 0 }], vec![]),
            ("gone for good", vec![(2, Some(link(2)))], vec![], &[2], vec![Disconnect { nic: 0 }], vec![]),
        ];
        for (case, nics, links, lost, changes, unconnected) in table {
            assert_eq!(compare(&nics, &links, lost), (changes, unconnected), "{case}");
        }
    }
}
