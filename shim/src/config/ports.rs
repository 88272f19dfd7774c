//! The annotation with port mappings: `tcp:18080:18080,udp:127.0.0.1:5353:53,tcp:8000-8010:9000-9010`.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use super::settings::Config;
use super::values::one_of;
use crate::network::user::{HostPort, PortMapping, Protocol};

/// Most ports of a sandbox. Each takes a descriptor of the VMM and a file on the host.
const MAX: usize = 256;
const FORM: &str = "must be PROTOCOL:[ADDRESS:]HOST_PORT:GUEST_PORT";

/// Reads the annotation.
///
/// # Errors
/// Everything that is malformed or not allowed, each with its entry.
pub(super) fn parse(text: &str, config: &Config) -> Result<Vec<PortMapping>, String> {
    let mut ports: Vec<PortMapping> = Vec::new();
    let mut problems = Vec::new();
    for entry in text.split(',').map(str::trim) {
        let added = entry_of(entry, config).and_then(|entry| {
            // Before any of a range is stored: a range may have 65535 ports.
            let mappings: Vec<PortMapping> = entry.mappings().take(MAX + 1).collect();
            if ports.len() + mappings.len() > MAX {
                return Err(format!("a sandbox can map at most {MAX} ports"));
            }
            let twice = mappings.iter().find(|new| ports.iter().any(|old| old.host.overlaps(&new.host)));
            if let Some(twice) = twice {
                return Err(format!("maps the host's port {} again", twice.host));
            }
            ports.extend(mappings);
            Ok(())
        });
        problems.extend(added.err().map(|why| format!("{entry:?}: {why}")));
    }
    if problems.is_empty() { Ok(ports) } else { Err(problems.join("; ")) }
}

/// One entry: a port or a range of ports.
struct Entry {
    protocol: Protocol,
    address: Ipv4Addr,
    host: RangeInclusive<u16>,
    guest: RangeInclusive<u16>,
}

impl Entry {
    fn mappings(self) -> impl Iterator<Item = PortMapping> {
        let Self { protocol, address, host, guest } = self;
        host.zip(guest).map(move |(port, guest)| PortMapping { host: HostPort { protocol, address, port }, guest })
    }
}

fn entry_of(text: &str, config: &Config) -> Result<Entry, String> {
    let (protocol, rest) = text.split_once(':').ok_or(FORM)?;
    let protocol = one_of(Some(protocol), &Protocol::NAMES).map_err(|why| format!("the protocol {why}"))?;
    let (rest, guest) = rest.rsplit_once(':').ok_or(FORM)?;
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => (host_address(address, config)?, host),
        None => (Ipv4Addr::LOCALHOST, rest),
    };
    let (host, guest) = (range(host, "host")?, range(guest, "guest")?);
    if host.len() != guest.len() {
        return Err(format!("{} ports of the host cannot be mapped to {} of the guest", host.len(), guest.len()));
    }
    if host.len() > 1 && !config.port_ranges {
        return Err("ranges need port_ranges = true in husk's configuration".to_owned());
    }
    Ok(Entry { protocol, address, host, guest })
}

fn host_address(text: &str, config: &Config) -> Result<Ipv4Addr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = match bare.parse() {
        Ok(IpAddr::V4(address)) if bare == text => address,
        Ok(IpAddr::V6(address)) => {
            return Err(format!(
                "the host's address {address}: user-mode networking maps ports of IPv4 addresses only"
            ));
        }
        _ => return Err(format!("the host's address {text:?} must be an IP address")),
    };
    // Whoever may map a port of all addresses may map one of each.
    let allowed = &config.port_addresses;
    if address.is_loopback() || allowed.contains(&address) || allowed.contains(&Ipv4Addr::UNSPECIFIED) {
        return Ok(address);
    }
    Err(format!(
        "the host's address {address} is not a loopback address and not among the configuration's port_addresses"
    ))
}

fn range(text: &str, whose: &str) -> Result<RangeInclusive<u16>, String> {
    let number = |text: &str| {
        // FromStr accepts a plus sign.
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u16>().ok().filter(|port| digits && *port > 0)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!("the {whose}'s port {text:?} must be a number from 1 to 65535, or a range of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, config: &Config) -> Result<Vec<String>, String> {
        parse(text, config).map(|ports| ports.iter().map(ToString::to_string).collect())
    }

    fn config(addresses: &[&str], ranges: bool) -> Config {
        let port_addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Config { port_addresses, port_ranges: ranges, ..Config::default() }
    }

    #[test]
    fn mappings_are_read() {
        let table: [(&str, &[&str], &[&str]); 6] = [
            ("tcp:18080:80", &[], &["127.0.0.1:18080/tcp -> 80"]),
            (
                "tcp:18080:18080,udp:127.0.0.1:5353:53",
                &[],
                &["127.0.0.1:18080/tcp -> 18080", "127.0.0.1:5353/udp -> 53"],
            ),
            ("tcp:127.1.2.3:1:65535, udp:1:1", &[], &["127.1.2.3:1/tcp -> 65535", "127.0.0.1:1/udp -> 1"]),
            (
                "tcp:0.0.0.0:8000-8001:9000-9001",
                &["0.0.0.0"],
                &["0.0.0.0:8000/tcp -> 9000", "0.0.0.0:8001/tcp -> 9001"],
            ),
            ("tcp:192.0.2.1:80:80", &["192.0.2.1"], &["192.0.2.1:80/tcp -> 80"]),
            ("tcp:192.0.2.1:80:80", &["0.0.0.0"], &["192.0.2.1:80/tcp -> 80"]),
        ];
        for (text, addresses, expected) in table {
            let expected = expected.iter().map(|port| (*port).to_owned()).collect();
            assert_eq!(shown(text, &config(addresses, true)), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_malformed_or_not_allowed_is_named() {
        let table = [
            ("", "\"\": must be PROTOCOL:[ADDRESS:]HOST_PORT:GUEST_PORT"),
            ("tcp:80", "\"tcp:80\": must be PROTOCOL:[ADDRESS:]HOST_PORT:GUEST_PORT"),
            ("sctp:80:80", "\"sctp:80:80\": the protocol must be one of \"tcp\", \"udp\""),
            ("tcp:0:80", "\"tcp:0:80\": the host's port \"0\" must be a number from 1 to 65535, or a range of them"),
            (
                "tcp:80:+80",
                "\"tcp:80:+80\": the guest's port \"+80\" must be a number from 1 to 65535, or a range of them",
            ),
            (
                "tcp:90-80:80-90",
                "\"tcp:90-80:80-90\": the host's port \"90-80\" must be a number from 1 to 65535, or a range of them",
            ),
            (
                "tcp:[::1]:80:80",
                "\"tcp:[::1]:80:80\": the host's address ::1: user-mode networking maps ports of IPv4 addresses only",
            ),
            (
                "tcp:[127.0.0.1]:80:80",
                "\"tcp:[127.0.0.1]:80:80\": the host's address \"[127.0.0.1]\" must be an IP address",
            ),
            ("tcp:web:80:80", "\"tcp:web:80:80\": the host's address \"web\" must be an IP address"),
            (
                "tcp:0.0.0.0:80:80",
                "\"tcp:0.0.0.0:80:80\": the host's address 0.0.0.0 is not a loopback address and not among the configuration's port_addresses",
            ),
            ("tcp:80-81:80-81", "\"tcp:80-81:80-81\": ranges need port_ranges = true in husk's configuration"),
            ("tcp:80-81:80", "\"tcp:80-81:80\": 2 ports of the host cannot be mapped to 1 of the guest"),
            ("tcp:80:80,tcp:127.0.0.1:80:81", "\"tcp:127.0.0.1:80:81\": maps the host's port 127.0.0.1:80/tcp again"),
        ];
        for (text, expected) in table {
            assert_eq!(shown(text, &config(&["192.0.2.1"], false)), Err(expected.to_owned()), "{text}");
        }
        let all = shown("tcp:0:1,udp:x:1", &Config::default()).unwrap_err();
        assert!(all.contains("\"tcp:0:1\": ") && all.contains("; \"udp:x:1\": "), "{all}");
        let many = shown("tcp:1-65535:1-65535", &config(&[], true)).unwrap_err();
        assert_eq!(many, "\"tcp:1-65535:1-65535\": a sandbox can map at most 256 ports");
        assert_eq!(shown("tcp:1-256:1-256", &config(&[], true)).map(|ports| ports.len()), Ok(256));
    }
}
