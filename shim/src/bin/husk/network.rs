//! The network of a VM, as `husk status` shows it.

use std::fmt::Write as _;

use husk_shim::state::links::{Counters, GuestLink, LinkStatus, NetworkStatus, NicStatus};

use crate::print::{or_dash, shown, table};

/// The links as a table, with the namespace and what is missing.
pub(crate) fn page(network: Option<&NetworkStatus>) -> String {
    let Some(network) = network else { return "not known\n".to_owned() };
    let mut page = String::new();
    if let Some(netns) = &network.netns {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "connected to the namespace {}", shown(&netns.to_string_lossy()));
    }
    for problem in &network.problems {
        let _ = writeln!(page, "NOTE: {}", shown(problem));
    }
    if network.links.is_empty() {
        page.push_str("no links\n");
        return page;
    }
    let titles = ["LINK", "MAC", "MTU", "STATE", "ON THE HOST", "RECEIVED", "SENT", "ADDRESSES"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(network.links.iter().map(row));
    page.push_str(&table(&rows));
    page
}

fn row(link: &LinkStatus) -> Vec<String> {
    let guest = link.guest.as_ref();
    let counted = |count: fn(&Counters) -> [u64; 4]| guest.map(|guest| traffic(count(&guest.counters)));
    let received = |c: &Counters| [c.received_bytes, c.received_packets, c.received_errors, c.received_dropped];
    let sent = |c: &Counters| [c.sent_bytes, c.sent_packets, c.sent_errors, c.sent_dropped];
    vec![
        or_dash(guest.map(|guest| &guest.name)),
        or_dash(link.mac.as_ref()),
        or_dash(guest.map(|guest| guest.mtu)),
        or_dash(guest.map(state)),
        or_dash(link.host.as_ref().map(host)),
        or_dash(counted(received)),
        or_dash(counted(sent)),
        or_dash(guest.filter(|guest| !guest.addresses.is_empty()).map(|guest| guest.addresses.join(", "))),
    ]
}

fn state(link: &GuestLink) -> &'static str {
    match (link.up, link.carrier) {
        (true, true) => "up",
        (true, false) => "no carrier",
        (false, _) => "down",
    }
}

fn host(nic: &NicStatus) -> String {
    match &nic.link {
        Some(link) => format!("{} via {}", link.name, nic.tap),
        None => format!("spare, {}", nic.tap),
    }
}

fn traffic([bytes, packets, errors, dropped]: [u64; 4]) -> String {
    let plural = if packets == 1 { "" } else { "s" };
    let mut text = format!("{} in {packets} packet{plural}", size(bytes));
    for (count, what) in [(errors, "errors"), (dropped, "dropped")] {
        if count > 0 {
            let _ = write!(text, ", {count} {what}");
        }
    }
    text
}

/// Bytes with a binary prefix.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10) as usize;
    let unit = units.get(power - 1).copied().unwrap_or_default();
    format!("{:.1} {unit}", bytes as f64 / (1_u64 << (10 * power)) as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_link_is_a_row_without_terminal_commands() {
        let network: NetworkStatus = serde_json::from_value(json!({
            "netns": "/run/netns/pod\u{1b}", "problems": ["something\u{7}"],
            "links": [
                {"mac": "02:00:00:00:00:01",
                    "guest": {"name": "eth0", "mtu": 1400, "up": true, "carrier": true,
                        "addresses": ["10.88.0.7/16", "fd00::7/64"],
                        "counters": {"received_bytes": 1536, "received_packets": 3, "received_dropped": 2,
                            "sent_bytes": 7, "sent_packets": 1}},
                    "host": {"nic": "06:01", "tap": "husk-2", "link": {"name": "eth0"}}},
                {"mac": "02:00:00:00:00:02", "guest": null,
                    "host": {"nic": "06:02", "tap": "husk-3", "link": {"name": "net1\u{1b}"}}},
                {"mac": "06:00:00:00:00:03", "guest": null, "host": {"nic": "06:03", "tap": "husk-4"}},
                {"mac": null, "guest": {"name": "tun0\u{1b}", "mtu": 1500, "up": true, "carrier": false}, "host": null},
            ],
        }))
        .unwrap();
        let expected = "\
connected to the namespace /run/netns/pod^[
NOTE: something^G
LINK    MAC                MTU   STATE       ON THE HOST        RECEIVED                         SENT              ADDRESSES
eth0    02:00:00:00:00:01  1400  up          eth0 via husk-2    1.5 KiB in 3 packets, 2 dropped  7 B in 1 packet   10.88.0.7/16, fd00::7/64
-       02:00:00:00:00:02  -     -           net1^[ via husk-3  -                                -                 -
-       06:00:00:00:00:03  -     -           spare, husk-4      -                                -                 -
tun0^[  -                  1500  no carrier  -                  0 B in 0 packets                 0 B in 0 packets  -
";
        assert_eq!(page(Some(&network)), expected);
    }

    #[test]
    fn a_network_without_links_and_an_unknown_one_differ() {
        assert_eq!(page(None), "not known\n");
        assert_eq!(page(Some(&NetworkStatus::default())), "no links\n");
    }

    #[test]
    fn sizes_have_a_binary_prefix() {
        let table = [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (u64::MAX, "16.0 EiB")];
        for (bytes, expected) in table {
            assert_eq!(size(bytes), expected);
        }
    }
}
