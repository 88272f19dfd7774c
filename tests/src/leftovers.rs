//! What a shim could leave behind: compares snapshots of a private containerd's environment.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cgroup;
use crate::containerd::Containerd;
use crate::process;
use crate::walk::walk;

/// How long containerd and a shim may clean up after the call that ended the container has returned.
const SETTLE: Duration = Duration::from_secs(30);

/// A snapshot of everything that a container could leave behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Takes the snapshot.
    pub fn now(containerd: &Containerd) -> Self {
        Self::now_without(containerd, &[])
    }

    /// Takes the snapshot without the content of these folders of `/run`.
    pub fn now_without(containerd: &Containerd, folders: &[&str]) -> Self {
        let mut found = BTreeSet::new();
        for process in process::descendants(containerd.pid()) {
            let command = if process.zombie { "zombie" } else { process.command.as_str() };
            found.insert(format!("process {} {}: {command}", process.pid, process.name));
        }
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", containerd.pid())).unwrap_or_default();
        for line in mounts.lines() {
            // Field 5 of proc_pid_mountinfo(5) is the mount point; the fields before it are numbers that change.
            let fields: Vec<&str> = line.split(' ').skip(4).collect();
            found.insert(format!("mount {}", fields.join(" ")));
        }
        let run = containerd.path("/run");
        // Except containerd's own store, and what this harness mounts and writes.
        let own = ["/run/containerd/root", "/run/image", "/run/bundles"];
        let except: Vec<_> = own.iter().chain(folders).map(|path| containerd.path(path)).collect();
        walk(&run, &except, &mut |path, kind| {
            let path = path.strip_prefix(&run).unwrap_or(path);
            found.insert(format!("{kind} /run/{}", path.display()));
        });
        for cgroup in cgroup::find(containerd.token()) {
            found.insert(format!("cgroup {}", cgroup.display()));
        }
        let devices = fs::read_to_string(format!("/proc/{}/net/dev", containerd.pid())).unwrap_or_default();
        // Two lines of headers: proc_pid_net(5).
        for (device, _) in devices.lines().skip(2).filter_map(|line| line.split_once(':')) {
            found.insert(format!("network device {}", device.trim()));
        }
        Self(found)
    }

    /// Lines of `after` that are missing in `self`.
    pub fn added(&self, after: &Self) -> Vec<String> {
        after.0.difference(&self.0).cloned().collect()
    }

    /// Fails if anything remains that this snapshot does not contain. Asynchronous cleanup gets a short grace period.
    pub fn expect_none_since(&self, containerd: &Containerd) -> Result<()> {
        self.expect_none_since_but(containerd, |_| false)
    }

    /// Like [`Self::expect_none_since`], but ignores lines for which `excused` holds.
    pub fn expect_none_since_but(&self, containerd: &Containerd, excused: impl Fn(&str) -> bool) -> Result<()> {
        let started = Instant::now();
        loop {
            let mut added = self.added(&Self::now(containerd));
            added.retain(|line| !excused(line));
            if added.is_empty() {
                return Ok(());
            }
            if started.elapsed() > SETTLE {
                bail!("still there after {SETTLE:?}:\n  {}\n{}", added.join("\n  "), containerd.log_tail());
            }
            // containerd does not report when its asynchronous removals are done.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
