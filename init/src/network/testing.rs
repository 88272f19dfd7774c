//! Real network namespaces for tests, and short forms of requests. Needs root and iproute2.

use std::io;
use std::net::IpAddr;
use std::process::Command;

use husk_protos::chain::Chain;
use husk_protos::network::{ConfigureNetworkRequest, NetworkAddress, NetworkLink, NetworkRoute};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::apply::configure;
use super::driver::Driver;
use super::model::{Applied, Mac};

/// No NIC ever lacks its driver.
pub(super) struct NoDriver;

impl Driver for NoDriver {
    fn attach(&self, _: &[Mac]) -> io::Result<()> {
        Ok(())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        panic!("detach {name}")
    }
}

/// No NIC needs its driver, and there is none.
pub(super) struct Broken;

impl Driver for Broken {
    fn attach(&self, _: &[Mac]) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        panic!("detach {name}")
    }
}

/// The driver of veth devices, by their names and by the last bytes of their MAC addresses.
pub(super) struct Veths(pub(super) &'static [(&'static str, u8)]);

impl Driver for Veths {
    fn attach(&self, held: &[Mac]) -> io::Result<()> {
        for (name, number) in self.0 {
            // A link may have changed its name.
            let is_there = ip("link").contains(&format!("peer{number}@"));
            if !held.contains(&[2, 0, 0, 0, 0, *number]) && !is_there {
                add_veth(name, *number);
            }
        }
        Ok(())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        // A peer ends with its device.
        if !name.starts_with("peer") {
            ip(&format!("link delete {name}"));
        }
        Ok(())
    }
}

fn add_veth(name: &str, number: u8) {
    ip(&format!("link add {name} address 02:00:00:00:00:0{number} type veth peer name peer{number}"));
    ip(&format!("link set peer{number} addrgenmode none up"));
}

pub(super) const NODAD: u32 = 0x02;
pub(super) const NOPREFIXROUTE: u32 = 0x200;
pub(super) const ONLINK: u32 = 0x4;
pub(super) const SCOPE_LINK: u32 = 253;
pub(super) const PROTOCOL_KERNEL: u32 = 2;
pub(super) const TO_TABLE: u32 = 1;
pub(super) const BLACKHOLE: u32 = 6;
pub(super) const UNREACHABLE: u32 = 7;

/// Runs a test in a network namespace with a veth device for each name, whose MAC addresses end in 1, 2, …
pub(super) fn in_namespace(devices: &'static [&'static str], test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("create a network namespace, which needs root");
        ip("link set lo up");
        for (name, number) in devices.iter().zip(1..) {
            add_veth(name, number);
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(super) fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("run ip, of the package iproute2");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn json(args: &str) -> Vec<Value> {
    let text = ip(&format!("-j {args}"));
    if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
}

/// The lines that `ip` prints, without details that do not matter here.
pub(super) fn lines(args: &str) -> Vec<String> {
    ip(args).lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// All that a request can change, one line per object.
pub(super) fn everything() -> Vec<String> {
    let mut objects = Vec::new();
    for link in json("addr") {
        let up = link["flags"].as_array().unwrap().contains(&"UP".into());
        objects.push(format!("link {} {} {} {up}", link["ifname"], link["address"], link["mtu"]));
        for address in link["addr_info"].as_array().unwrap() {
            objects.push(format!("address {address} on {}", link["ifname"]));
        }
    }
    for list in ["-4 route show table all", "-6 route show table all", "rule", "-6 rule", "neigh show nud permanent"] {
        objects.extend(json(list).iter().map(|object| format!("{list}: {object}")));
    }
    // Not the other ends of the veth devices, and not the local table, where the kernel adds IPv6 addresses later.
    objects.retain(|object| !object.contains("\"peer") && !object.contains("\"table\":\"local\""));
    objects
}

pub(super) fn bytes(address: &str) -> Vec<u8> {
    match address.parse() {
        Ok(IpAddr::V4(address)) => address.octets().to_vec(),
        Ok(IpAddr::V6(address)) => address.octets().to_vec(),
        Err(_) => panic!("{address}"),
    }
}

pub(super) fn family(address: &str) -> u32 {
    if address.contains(':') { libc::AF_INET6 as u32 } else { libc::AF_INET as u32 }
}

pub(super) fn split(prefix: &str) -> (&str, u32) {
    let (address, length) = prefix.split_once('/').unwrap();
    (address, length.parse().unwrap())
}

pub(super) fn link(name: &str, number: u8, addresses: &[NetworkAddress]) -> NetworkLink {
    NetworkLink {
        name: name.into(),
        mac: vec![2, 0, 0, 0, 0, number],
        mtu: 1500,
        up: true,
        addresses: addresses.to_vec(),
        ..Default::default()
    }
}

pub(super) fn address(prefix: &str, flags: u32) -> NetworkAddress {
    let (local, prefix_length) = split(prefix);
    NetworkAddress { local: bytes(local), prefix_length, flags, ..Default::default() }
}

/// A route on `link`, unless that is empty. `destination` is a prefix, with no bits for a default route.
pub(super) fn route(destination: &str, gateway: &str, link: &str) -> NetworkRoute {
    let (address, prefix_length) = split(destination);
    NetworkRoute {
        family: family(address),
        destination: if prefix_length == 0 { Vec::new() } else { bytes(address) },
        prefix_length,
        link: link.into(),
        gateway: if gateway.is_empty() { Vec::new() } else { bytes(gateway) },
        scope: if gateway.is_empty() { SCOPE_LINK } else { 0 },
        table: 254,
        protocol: 3,
        kind: 1,
        ..Default::default()
    }
}

pub(super) fn request(links: &[NetworkLink], routes: &[NetworkRoute]) -> ConfigureNetworkRequest {
    ConfigureNetworkRequest { links: links.to_vec(), routes: routes.to_vec(), ..Default::default() }
}

pub(super) fn difference(before: &[String], after: &[String]) -> String {
    let lost = before.iter().filter(|line| !after.contains(line)).map(|line| format!("\n- {line}"));
    let new = after.iter().filter(|line| !before.contains(line)).map(|line| format!("\n+ {line}"));
    lost.chain(new).collect()
}

/// Applies a request, and checks that repeating it changes nothing.
pub(super) fn apply(request: &ConfigureNetworkRequest, last: &mut Applied) {
    let configure = |last: &mut Applied| {
        if let Err(error) = configure(request, last, &NoDriver) {
            panic!("{}", Chain(&error));
        }
        everything()
    };
    let first = configure(last);
    let second = configure(last);
    assert!(first == second, "a repeated request changed something: {}", difference(&first, &second));
}

pub(super) fn error(request: &ConfigureNetworkRequest, last: &mut Applied) -> String {
    Chain(&configure(request, last, &NoDriver).unwrap_err()).to_string()
}

/// What the CNI bridge plugin configures for a network with IPv4 and IPv6.
pub(super) fn dual_stack() -> ConfigureNetworkRequest {
    let addresses = [
        NetworkAddress { broadcast: bytes("10.88.255.255"), ..address("10.88.0.5/16", 0) },
        address("fd00:88::5/64", NODAD),
        NetworkAddress { scope: SCOPE_LINK, ..address("fe80::ff:fe00:1/64", NODAD) },
    ];
    let connected =
        NetworkRoute { protocol: PROTOCOL_KERNEL, source: bytes("10.88.0.5"), ..route("10.88.0.0/16", "", "eth0") };
    let connected6 = NetworkRoute { protocol: PROTOCOL_KERNEL, priority: 256, ..route("fd00:88::/64", "", "eth0") };
    let routes = [
        route("0.0.0.0/0", "10.88.0.1", "eth0"),
        connected,
        NetworkRoute { priority: 1024, ..route("::/0", "fd00:88::1", "eth0") },
        connected6,
    ];
    request(&[NetworkLink { mtu: 1400, ..link("eth0", 1, &addresses) }], &routes)
}
