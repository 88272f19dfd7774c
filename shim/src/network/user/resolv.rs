//! The `resolv.conf` of a container in user mode: the VMM's relay to the host's resolver, with the search list and the
//! options of the host.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The VMM's relay to the host's resolver.
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// As [`DNS`], for IPv6.
pub(crate) const DNS6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 3);
/// The host's file. The VMM reads it too, to find the resolver.
const HOST: &str = "/etc/resolv.conf";
/// Longest file that is read, bytes. resolv.conf(5) has a few lines.
const MAX: u64 = 64 << 10;
/// The lines that apply in the guest as well. `sortlist` names networks of the host.
const KEPT: [&str; 3] = ["domain", "search", "options"];

/// The container's file.
///
/// # Errors
/// The host's file cannot be read.
pub(crate) fn resolv_conf() -> io::Result<String> {
    Ok(translate(&String::from_utf8_lossy(&host_resolv_conf()?)))
}

/// The host's file, for the VMM.
///
/// # Errors
/// It cannot be read.
pub(crate) fn host_resolv_conf() -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match File::open(Path::new(HOST)) {
        Ok(file) => drop(file.take(MAX).read_to_end(&mut text)?),
        // Without the file, the resolver is on the host itself: resolv.conf(5).
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(text)
}

/// Translates the host's file. The VMM relays to the host's first resolver of the relay's address family.
fn translate(host: &str) -> String {
    let words = |line: &'_ str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<Vec<String>> = host.lines().map(words).collect();
    let servers: Vec<IpAddr> = lines
        .iter()
        .filter(|line| line.first().is_some_and(|word| word == "nameserver"))
        .filter_map(|line| line.get(1)?.split('%').next()?.parse().ok())
        .collect();
    let ipv4 = servers.iter().any(IpAddr::is_ipv4);
    let ipv6 = servers.iter().any(IpAddr::is_ipv6);
    let mut text = String::new();
    if ipv4 || !ipv6 {
        text.push_str(&format!("nameserver {DNS}\n"));
    }
    if ipv6 {
        text.push_str(&format!("nameserver {DNS6}\n"));
    }
    for line in lines.iter().filter(|line| line.first().is_some_and(|word| KEPT.contains(&word.as_str()))) {
        text.push_str(&line.join(" "));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_resolvers_are_replaced_by_the_relay() {
        let table = [
            ("", "nameserver 10.0.2.3\n"),
            ("nameserver example\n", "nameserver 10.0.2.3\n"),
            ("# a comment\nnameserver 127.0.0.53\n", "nameserver 10.0.2.3\n"),
            ("nameserver fd00::53\n", "nameserver fec0::3\n"),
            ("nameserver fe80::1%eth0", "nameserver fec0::3\n"),
            (
                "search  a.example b.example\nnameserver ::1\nnameserver\t192.0.2.1\nnameserver 192.0.2.2\n\
                 options edns0 ndots:2\nsortlist 192.0.2.0\n; x",
                "nameserver 10.0.2.3\nnameserver fec0::3\nsearch a.example b.example\noptions edns0 ndots:2\n",
            ),
        ];
        for (host, expected) in table {
            assert_eq!(translate(host), expected, "{host}");
        }
    }
}
