//! The files that the containers of a pod find in `/etc`. With a pause container, containerd's CRI plugin writes and
//! mounts them; with `sandboxer = "shim"`, it leaves that to the sandbox (containerd 2.4,
//! `internal/cri/server/podsandbox/sandbox_run_linux.go` and `linuxContainerMounts`).

use std::fs;
use std::io;

use husk_protos::cri::DNSConfig;

/// Where a container's resolver looks for its configuration.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// A file of a pod's containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFile {
    /// Where the containers find it.
    pub(crate) destination: &'static str,
    pub(crate) content: Vec<u8>,
}

/// What a pod takes over from its node if its configuration does not say otherwise.
#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) hostname: String,
    pub(super) hosts: Vec<u8>,
    pub(super) resolv_conf: Vec<u8>,
}

impl Node {
    /// Reads the node's. A file that does not exist is empty.
    ///
    /// # Errors
    /// Those of the files, with their paths.
    pub(super) fn read() -> io::Result<Self> {
        let read = |path: &str| match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(io::Error::new(error.kind(), format!("read {path}: {error}"))),
            read => read,
        };
        let hostname = nix::unistd::gethostname()?;
        Ok(Self {
            hostname: hostname.to_string_lossy().into_owned(),
            hosts: read(HOSTS)?,
            resolv_conf: read(RESOLV_CONF)?,
        })
    }
}

/// A pod's `resolv.conf` (resolv.conf(5)), as containerd's CRI plugin writes it.
pub(super) fn resolv_conf(dns: &DNSConfig) -> Vec<u8> {
    let words = |key: &str, words: &[String]| match words {
        [] => String::new(),
        words => format!("{key} {}\n", words.join(" ")),
    };
    let servers: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    [words("search", &dns.searches), servers, words("options", &dns.options)].concat().into_bytes()
}

/// All files of a pod with this host name.
pub(super) fn of_pod(hostname: &str, node: &Node, resolv_conf: Vec<u8>) -> Vec<PodFile> {
    let hostname = format!("{hostname}\n").into_bytes();
    let files = [("/etc/hostname", hostname), (HOSTS, node.hosts.clone()), (RESOLV_CONF, resolv_conf)];
    files.map(|(destination, content)| PodFile { destination, content }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_dns_configuration_is_written_as_containerd_writes_it() {
        let dns = DNSConfig {
            servers: vec!["10.96.0.10".into(), "10.96.0.11".into()],
            searches: vec!["svc.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let expected = "search svc.local local\nnameserver 10.96.0.10\nnameserver 10.96.0.11\noptions ndots:5\n";
        assert_eq!(String::from_utf8(resolv_conf(&dns)).unwrap(), expected);
        assert_eq!(resolv_conf(&DNSConfig::default()), b"");
    }
}
