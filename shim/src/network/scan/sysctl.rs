//! The sysctls of a namespace that differ from those of a new guest: CNI's `tuning` plugin sets them, and so do
//! administrators.
//!
//! Only the sysctls listed here are copied. The others are either sizes that the kernel derives from the machine's
//! memory, or names of modules, or of no use in a container.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;

use husk_protos::network::{ConfigureNetworkRequest, NetworkSysctl};
use nix::sched::{CloneFlags, setns};

use crate::network::error::ObjectError;
use crate::network::link::Link;

/// Sysctls below /proc/sys/net, and their values in a new guest.
const GLOBAL: [(&str, &str); 51] = [
    ("core/somaxconn", "4096"),
    ("ipv4/icmp_echo_ignore_all", "0"),
    ("ipv4/icmp_echo_ignore_broadcasts", "1"),
    ("ipv4/ip_default_ttl", "64"),
    ("ipv4/ip_forward", "0"),
    ("ipv4/ip_local_port_range", "32768 60999"),
    ("ipv4/ip_local_reserved_ports", ""),
    ("ipv4/ip_no_pmtu_disc", "0"),
    ("ipv4/ip_nonlocal_bind", "0"),
    ("ipv4/ip_unprivileged_port_start", "1024"),
    ("ipv4/ping_group_range", "1 0"),
    ("ipv4/tcp_abort_on_overflow", "0"),
    ("ipv4/tcp_base_mss", "1024"),
    ("ipv4/tcp_ecn", "2"),
    ("ipv4/tcp_fastopen", "1"),
    ("ipv4/tcp_fin_timeout", "60"),
    ("ipv4/tcp_keepalive_intvl", "75"),
    ("ipv4/tcp_keepalive_probes", "9"),
    ("ipv4/tcp_keepalive_time", "7200"),
    ("ipv4/tcp_mtu_probing", "0"),
    ("ipv4/tcp_no_metrics_save", "0"),
    ("ipv4/tcp_notsent_lowat", "4294967295"),
    ("ipv4/tcp_orphan_retries", "0"),
    ("ipv4/tcp_retries1", "3"),
    ("ipv4/tcp_retries2", "15"),
    ("ipv4/tcp_rfc1337", "0"),
    ("ipv4/tcp_sack", "1"),
    ("ipv4/tcp_slow_start_after_idle", "1"),
    ("ipv4/tcp_syn_retries", "6"),
    ("ipv4/tcp_synack_retries", "5"),
    ("ipv4/tcp_syncookies", "1"),
    ("ipv4/tcp_timestamps", "1"),
    ("ipv4/tcp_tw_reuse", "2"),
    ("ipv4/tcp_window_scaling", "1"),
    ("ipv4/conf/all/accept_redirects", "1"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/arp_announce", "0"),
    ("ipv4/conf/all/arp_filter", "0"),
    ("ipv4/conf/all/arp_ignore", "0"),
    ("ipv4/conf/all/log_martians", "0"),
    ("ipv4/conf/all/proxy_arp", "0"),
    ("ipv4/conf/all/route_localnet", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "1"),
    ("ipv4/conf/all/src_valid_mark", "0"),
    ("ipv6/bindv6only", "0"),
    ("ipv6/ip_nonlocal_bind", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv6/conf/all/accept_redirects", "1"),
    ("ipv6/conf/all/proxy_ndp", "0"),
];

/// Sysctls of a link: without `conf` and its name after the family.
const LINK: [(&str, &str); 36] = [
    ("ipv4/accept_local", "0"),
    ("ipv4/accept_redirects", "1"),
    ("ipv4/accept_source_route", "1"),
    ("ipv4/arp_accept", "0"),
    ("ipv4/arp_announce", "0"),
    ("ipv4/arp_filter", "0"),
    ("ipv4/arp_ignore", "0"),
    ("ipv4/arp_notify", "0"),
    ("ipv4/disable_policy", "0"),
    ("ipv4/drop_gratuitous_arp", "0"),
    ("ipv4/forwarding", "0"),
    ("ipv4/ignore_routes_with_linkdown", "0"),
    ("ipv4/log_martians", "0"),
    ("ipv4/promote_secondaries", "0"),
    ("ipv4/proxy_arp", "0"),
    ("ipv4/route_localnet", "0"),
    ("ipv4/rp_filter", "0"),
    ("ipv4/secure_redirects", "1"),
    ("ipv4/send_redirects", "1"),
    ("ipv4/shared_media", "1"),
    ("ipv4/src_valid_mark", "0"),
    ("ipv6/accept_dad", "1"),
    ("ipv6/accept_ra", "1"),
    ("ipv6/accept_ra_defrtr", "1"),
    ("ipv6/accept_ra_pinfo", "1"),
    ("ipv6/accept_redirects", "1"),
    ("ipv6/accept_source_route", "0"),
    ("ipv6/autoconf", "1"),
    ("ipv6/dad_transmits", "1"),
    ("ipv6/disable_ipv6", "0"),
    ("ipv6/forwarding", "0"),
    ("ipv6/hop_limit", "64"),
    ("ipv6/keep_addr_on_down", "0"),
    ("ipv6/ndisc_notify", "0"),
    ("ipv6/proxy_ndp", "0"),
    ("ipv6/use_tempaddr", "0"),
];

/// Sysctls of a link that are copied even if they have their default: when the namespace's `all` changes, the kernel
/// changes those of every link too, and the link's own value counts.
const ALWAYS: [&str; 3] = ["ipv4/forwarding", "ipv6/disable_ipv6", "ipv6/forwarding"];

/// The paths of all sysctls that are copied for a link with this name, below /proc/sys/net.
pub fn copied_sysctls(link: &str) -> Vec<String> {
    let own = LINK.iter().map(|(name, _)| link_path(name, link));
    GLOBAL.iter().map(|(path, _)| (*path).to_owned()).chain(own).collect()
}

/// The sysctls of the namespace, and those of each link, that a new guest has to set.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sysctls<T> {
    pub(super) global: T,
    /// In the order of the links.
    pub(super) links: Vec<T>,
}

/// Reads the sysctls of the namespace that a socket belongs to.
pub(super) fn read(socket: BorrowedFd<'_>, links: &[Link]) -> Result<Sysctls<Vec<NetworkSysctl>>, ObjectError> {
    let failed = |action: &'static str| ObjectError::system("sysctls", action);
    let namespace = namespace(socket).map_err(failed("find the namespace"))?;
    // /proc/sys shows the namespace of the thread that opens a file. The caller's thread may be any.
    let inside = || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| failed("enter the namespace")(errno.into()))?;
        Ok(Sysctls {
            global: different(&GLOBAL, |path| path.to_owned())?,
            links: links
                .iter()
                .map(|link| different(&LINK, |name| link_path(name, &link.name)))
                .collect::<Result<_, _>>()?,
        })
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("sysctls".into()).spawn_scoped(scope, inside);
        let thread = thread.map_err(failed("start a thread"))?;
        thread.join().unwrap_or_else(|_| Err(failed("read them")(io::Error::other("the thread panicked"))))
    })
}

/// The network namespace of a socket.
fn namespace(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument and returns a new descriptor (linux/sockios.h).
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGSKNS) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is new and owned by nobody else.
        descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
    }
}

/// The sysctls of a list whose values differ from the list's.
fn different(list: &[(&str, &str)], path: impl Fn(&str) -> String) -> Result<Vec<NetworkSysctl>, ObjectError> {
    let mut found = Vec::new();
    for (name, value) in list {
        let path = path(name);
        let current = match fs::read_to_string(format!("/proc/sys/net/{path}")) {
            // The host's kernel lacks it, or the link is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(ObjectError::system(format!("sysctl net/{path}"), "read it"))?,
        };
        let current = current.split_whitespace().collect::<Vec<_>>().join(" ");
        if current != *value || ALWAYS.contains(name) {
            found.push(sysctl(name, current));
        }
    }
    Ok(found)
}

fn sysctl(name: &str, value: String) -> NetworkSysctl {
    let mut sysctl = NetworkSysctl::new();
    sysctl.name = name.to_owned();
    sysctl.value = value;
    sysctl
}

/// The sysctls that a guest has been told. Those that have their default again must be told too.
#[derive(Debug, Default)]
pub(in crate::network) struct Sent {
    global: HashSet<String>,
    /// Those of each NIC, by the MAC that identifies it.
    nics: HashMap<Vec<u8>, HashSet<String>>,
}

impl Sent {
    /// Adds to a request what an earlier request has set and the namespace has reset. A spare NIC has the defaults: its
    /// device has changed its namespace in the guest.
    pub(in crate::network) fn complete(&mut self, config: &mut ConfigureNetworkRequest) {
        add_reset(&GLOBAL, &mut self.global, &mut config.sysctls);
        for link in &mut config.links {
            let nic = if link.nic.is_empty() { &link.mac } else { &link.nic };
            add_reset(&LINK, self.nics.entry(nic.clone()).or_default(), &mut link.sysctls);
        }
        for spare in &config.spare_nics {
            self.nics.remove(spare);
        }
    }
}

fn add_reset(defaults: &[(&str, &str)], sent: &mut HashSet<String>, sysctls: &mut Vec<NetworkSysctl>) {
    let is_listed = |name: &str| sysctls.iter().any(|sysctl| sysctl.name == name);
    let reset = defaults.iter().filter(|(name, _)| sent.contains(*name) && !is_listed(name));
    let reset: Vec<_> = reset.map(|(name, value)| sysctl(name, (*value).to_owned())).collect();
    sysctls.extend(reset);
    sent.extend(sysctls.iter().map(|sysctl| sysctl.name.clone()));
}

fn link_path(name: &str, link: &str) -> String {
    let (family, name) = name.split_once('/').unwrap_or((name, ""));
    format!("{family}/conf/{link}/{name}")
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use husk_protos::network::NetworkLink;

    use super::*;
    use crate::network::netlink::Netlink;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;

    /// Reads from this thread, which is in another namespace.
    fn read_of(namespace: &Namespace) -> Sysctls<Vec<String>> {
        let open = |deadline| Ok(Netlink::open(deadline).unwrap());
        let netlink = claim(&namespace.path()).unwrap().run(Duration::from_secs(5), open).unwrap();
        let link = Link { index: 2, name: "eth0.1".into(), mac: [2; 6], mtu: 1500, up: true };
        let text =
            |list: Vec<NetworkSysctl>| list.iter().map(|found| format!("{}={}", found.name, found.value)).collect();
        let found = read(netlink.socket(), &[link]).unwrap();
        Sysctls { global: text(found.global), links: found.links.into_iter().map(text).collect() }
    }

    #[test]
    fn what_was_set_in_the_namespace_is_found() {
        let namespace = Namespace::new();
        namespace.ip("link add eth0.1 type veth peer name other");
        let before = read_of(&namespace);
        let script = "echo 77 >core/somaxconn; echo '2000 3000' >ipv4/ip_local_port_range
            echo 1 >ipv4/conf/eth0.1/arp_notify; echo 1 >ipv6/conf/eth0.1/disable_ipv6";
        let status = Command::new("nsenter")
            .arg(format!("--net={}", namespace.path().display()))
            .args(["sh", "-ec", &format!("cd /proc/sys/net; {script}")])
            .status()
            .unwrap();
        assert!(status.success());
        let mut after = read_of(&namespace);
        // The machine's own defaults may differ from the guest's.
        after.global.retain(|line| !before.global.contains(line));
        after.links[0].retain(|line| !before.links[0].contains(line));
        assert_eq!(after.global, ["core/somaxconn=77", "ipv4/ip_local_port_range=2000 3000"]);
        assert_eq!(after.links, [["ipv4/arp_notify=1", "ipv6/disable_ipv6=1"]]);
    }

    #[test]
    fn what_the_namespace_has_reset_is_sent_with_its_default_until_the_nic_is_spare() {
        let names = |config: &ConfigureNetworkRequest| -> Vec<String> {
            let of_links = config.links.iter().flat_map(|link| &link.sysctls);
            config.sysctls.iter().chain(of_links).map(|found| format!("{}={}", found.name, found.value)).collect()
        };
        let request = |global: &[(&str, &str)], link: &[(&str, &str)]| {
            let list =
                |sysctls: &[(&str, &str)]| sysctls.iter().map(|(name, value)| sysctl(name, (*value).into())).collect();
            let eth0 = NetworkLink { mac: vec![9; 6], nic: vec![2; 6], sysctls: list(link), ..Default::default() };
            ConfigureNetworkRequest { links: vec![eth0], sysctls: list(global), ..Default::default() }
        };
        let mut sent = Sent::default();
        let mut complete = |mut config: ConfigureNetworkRequest| {
            sent.complete(&mut config);
            names(&config)
        };
        assert_eq!(complete(request(&[], &[])), [""; 0]);
        let set = request(&[("core/somaxconn", "77")], &[("ipv4/rp_filter", "2")]);
        assert_eq!(complete(set), ["core/somaxconn=77", "ipv4/rp_filter=2"]);
        for _ in 0..2 {
            assert_eq!(complete(request(&[], &[])), ["core/somaxconn=4096", "ipv4/rp_filter=0"]);
        }
        let spare = ConfigureNetworkRequest { spare_nics: vec![vec![2; 6]], ..Default::default() };
        assert_eq!(complete(spare), ["core/somaxconn=4096"]);
        assert_eq!(complete(request(&[], &[])), ["core/somaxconn=4096"]);
    }
}
