//! Network namespaces for tests, which need root. `ip` and `tc` of iproute2 prepare and observe them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

/// A new network namespace; it exists until it is dropped.
pub(super) struct Namespace(File);

impl Namespace {
    pub(super) fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("the tests need root: unshare(CLONE_NEWNET)");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self(made.join().unwrap());
        namespace.ip("link set lo up");
        namespace
    }

    /// Two namespaces, joined by a veth: `eth0` in the first, `peer` in the second.
    pub(super) fn pair() -> (Self, Self) {
        let (pod, peer) = (Self::new(), Self::new());
        pod.ip(&format!("link add eth0 type veth peer name peer netns {}", peer.path().display()));
        pod.ip("link set eth0 up");
        peer.ip("link set peer up");
        (pod, peer)
    }

    /// Waits until no tap of husk is left. Processes that other tests start have copies of its descriptors until they
    /// execute their program.
    pub(super) fn wait_until_taps_are_gone(&self) {
        for _ in 0..500 {
            if !self.ip("link").contains("husk-") {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("a tap is left: {}", self.ip("link"));
    }

    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Runs `ip` with these arguments, separated by spaces.
    pub(super) fn ip(&self, arguments: &str) -> String {
        self.command("ip", arguments)
    }

    /// Runs `tc` with these arguments, separated by spaces.
    pub(super) fn tc(&self, arguments: &str) -> String {
        self.command("tc", arguments)
    }

    /// Runs `nft` with these arguments, separated by spaces.
    pub(super) fn nft(&self, arguments: &str) -> String {
        self.command("nft", arguments)
    }

    /// An interactive `nft` that has carried out a command; it ends with its stdin.
    pub(super) fn nft_session(&self, command: &str) -> Child {
        let mut session = Command::new("nsenter")
            .args([&format!("--net={}", self.path().display()), "nft", "--interactive"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the tests need nft");
        session.stdin.as_mut().unwrap().write_all(command.as_bytes()).unwrap();
        while !self.nft("list tables").contains("husk-") {
            thread::sleep(Duration::from_millis(10));
        }
        session
    }

    /// Runs `ip` and parses its JSON.
    pub(super) fn ip_json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.ip(&format!("-d -j {arguments}"))).unwrap()
    }

    fn command(&self, program: &str, arguments: &str) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.path().display()))
            .arg(program)
            .args(arguments.split_whitespace())
            .output()
            .expect("the tests need nsenter of util-linux");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }
}
