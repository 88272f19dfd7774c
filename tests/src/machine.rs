//! A machine: a private containerd with the folders and the surroundings that networks need.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::artifacts::Runtime;
use crate::command::{self, Output, wait_for};
use crate::containerd::{Containerd, Setup};
use crate::process;

/// How long a runtime may clean up after the call that ended the last container has returned.
const SETTLE: Duration = Duration::from_secs(30);
/// Deadline for one download, and for a server to become ready.
const DOWNLOAD: Duration = Duration::from_secs(60);

/// CNI plugins, nerdctl and docker write to the first three folders, at fixed paths. Another machine, the namespace
/// `outside`, has the address 192.0.2.2, and the machine 192.0.2.1.
const SURROUNDINGS: &str = "set -e
    for folder in etc opt var/lib; do
        mkdir -p /run/machine/$folder/upper /run/machine/$folder/work
        mount -t overlay -o lowerdir=/$folder,upperdir=/run/machine/$folder/upper,workdir=/run/machine/$folder/work machine /$folder
    done
    # What the machine's own plugins have left there.
    rm -rf /var/lib/cni /etc/cni /opt/cni
    ip netns add outside
    ip link add uplink type veth peer name eth0 netns outside
    ip addr add 192.0.2.1/24 dev uplink; ip link set uplink up
    ip -n outside addr add 192.0.2.2/24 dev eth0; ip -n outside link set eth0 up; ip -n outside link set lo up
    printf 'nameserver 192.0.2.2\\n' >/etc/resolv.conf
    sysctl -qw net.ipv4.ip_forward=1";

/// What remains of containers on the machine: devices, namespaces, firewall rules, leases.
const REST: &str =
    "ip -br link | cut -d' ' -f1; ip netns; tc qdisc | grep -c ingress || true; iptables-save | grep -v '^[:#]'
    find /var/lib/cni /run/nerdctl /run/cni -type f 2>/dev/null | sort";

const FETCH: &str = "import sys, urllib.request as u
sys.stdout.buffer.write(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=20).read())";
const SUM: &str = "import hashlib, sys, urllib.request as u
print(hashlib.md5(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=60).read()).hexdigest())";

/// A server on port 80 that ends at SIGTERM. `$0` is the name that it serves.
pub const WEB: &str = "mkdir -p /www; echo from $0 >/www/index.html; echo $0 has started
    httpd -p 80 -h /www; trap 'exit 0' TERM; sleep 100000 & wait";

/// A private containerd for one runtime, another machine, and folders of its own.
pub struct Machine(Containerd);

impl Machine {
    /// Starts the machine.
    pub fn start(runtime: Runtime) -> Result<Self> {
        Self::configured(runtime, "")
    }

    /// The same with lines of husk's configuration.
    pub fn configured(runtime: Runtime, husk: &str) -> Result<Self> {
        let setup = Setup { runtime: Some(runtime), husk: husk.to_owned(), ..Setup::default() };
        let containerd = Containerd::with(setup)?;
        containerd.sh(SURROUNDINGS).context("prepare the machine")?;
        Ok(Self(containerd))
    }

    /// The daemon.
    pub fn containerd(&self) -> &Containerd {
        &self.0
    }

    /// Downloads from the machine itself, as soon as the server answers.
    pub fn fetch(&self, url: &str) -> Result<String> {
        self.ready(url, || self.fetch_once(url))
    }

    /// Downloads from another machine, as soon as the server answers.
    pub fn fetch_from_outside(&self, url: &str) -> Result<String> {
        self.ready(url, || self.fetch_from_outside_once(url))
    }

    /// Downloads through the published ports 18080, which is public, and 127.0.0.1:18081, which must not be.
    pub fn fetch_published(&self) -> Result<String> {
        let mut seen = String::new();
        for url in ["http://127.0.0.1:18080", "http://192.0.2.1:18080", "http://127.0.0.1:18081"] {
            seen += &format!("{url} from the host: {}\n", self.fetch(url)?);
        }
        seen += &format!("from another machine: {}\n", self.fetch_from_outside("http://192.0.2.1:18080")?);
        let outside = self.fetch_from_outside_once("http://192.0.2.1:18081")?;
        ensure!(outside.code() != 0, "a port of 127.0.0.1 is public");
        Ok(seen)
    }

    /// One download from the machine itself.
    pub fn fetch_once(&self, url: &str) -> Result<Output> {
        self.python(&[], FETCH, url)
    }

    /// One download from another machine.
    pub fn fetch_from_outside_once(&self, url: &str) -> Result<Output> {
        self.python(&["ip", "netns", "exec", "outside"], FETCH, url)
    }

    /// MD5 of what another machine downloads.
    pub fn fetch_sum(&self, url: &str) -> Result<String> {
        Ok(self.python(&["ip", "netns", "exec", "outside"], SUM, url)?.ok()?.text())
    }

    fn python(&self, prefix: &[&str], program: &str, url: &str) -> Result<Output> {
        let words = [prefix, &["python3", "-c", program, url]].concat();
        let mut command = self.0.enter(words[0]);
        command.args(&words[1..]);
        command::run(command, None, DOWNLOAD)
    }

    fn ready(&self, url: &str, fetch: impl Fn() -> Result<Output>) -> Result<String> {
        let mut last = None;
        let answered = wait_for(DOWNLOAD, url, || match fetch() {
            Ok(output) if output.code() == 0 => Some(output.text()),
            other => {
                last = Some(other);
                None
            }
        });
        answered.with_context(|| format!("{last:?}"))
    }

    /// Fails unless only these links remain on the machine.
    pub fn expect_no_links(&self, but: &[&str]) -> Result<()> {
        let mut last = String::new();
        let gone = wait_for(SETTLE, "the containers' links are gone", || {
            last = self.0.sh("ip -o link | cut -d: -f2 | cut -d@ -f1").map_or_else(|e| format!("{e:?}"), |o| o.text());
            last.split_whitespace().all(|link| but.contains(&link)).then_some(())
        });
        gone.with_context(|| format!("links: {last}"))
    }

    /// What is left on the machine, with ids replaced by `ID`.
    fn remains(&self) -> Result<String> {
        let mut processes: Vec<_> = process::descendants(self.0.pid()).into_iter().map(|p| p.name).collect();
        processes.sort();
        let rest = normalized(&self.0.sh(REST)?.text());
        // The order of firewall rules follows from ids.
        let mut lines: Vec<&str> = rest.lines().collect();
        lines.sort();
        Ok(format!("{processes:?}\n{}", lines.join("\n")))
    }

    /// What is left on the machine when its shims have ended.
    pub fn settled(&self) -> Result<String> {
        wait_for(SETTLE, "the shims have ended", || {
            self.remains().map(|rest| (!rest.contains("containerd-shim")).then_some(rest)).transpose()
        })?
    }

    /// Fails unless the machine settles at what `expected` describes.
    pub fn expect_remains(&self, expected: &str) -> Result<()> {
        let mut last = String::new();
        let settled = wait_for(SETTLE, "nothing else is left", || match self.remains() {
            Ok(rest) => {
                last = rest;
                (last == expected).then_some(())
            }
            Err(e) => {
                last = format!("{e:?}");
                None
            }
        });
        ensure!(settled.is_ok(), "--- left ---\n{last}\n--- expected ---\n{expected}\n{}", self.0.log_tail());
        Ok(())
    }
}

/// Replaces what is random in an output: ids and hashes, which are at least twelve hexadecimal digits.
pub fn normalized(text: &str) -> String {
    let mut out = String::new();
    let mut word = String::new();
    for c in text.chars().chain(['\0']) {
        if c.is_ascii_alphanumeric() {
            word.push(c);
            continue;
        }
        let is_id = word.len() >= 12 && word.chars().all(|c| c.is_ascii_hexdigit());
        out += if is_id { "ID" } else { &word };
        word.clear();
        if c != '\0' {
            out.push(c);
        }
    }
    out
}
