//! What a shim could leave behind: compares the state of a private containerd's corner before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::containerd::Containerd;
use crate::process;

/// Longest that containerd and a shim may take to clean up after the call that ended the container has returned.
const SETTLE: Duration = Duration::from_secs(5);

/// A snapshot of everything that a container could leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Takes the snapshot.
    pub fn now(containerd: &Containerd) -> Self {
        let mut found = BTreeSet::new();
        for process in process::descendants(containerd.pid()) {
            let command = if process.zombie { "zombie" } else { process.command.as_str() };
            found.insert(format!("process {} {}: {command}", process.pid, process.name));
        }
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", containerd.pid())).unwrap_or_default();
        for line in mounts.lines() {
            // Field 5 of proc_pid_mountinfo(5) is the mount point, the first ones are numbers that change.
            let fields: Vec<&str> = line.split(' ').skip(4).collect();
            found.insert(format!("mount {}", fields.join(" ")));
        }
        let run = containerd.path("/run");
        // containerd's own store, and what this harness mounts and writes.
        let except = ["/run/containerd/root", "/run/image", "/run/bundles"].map(|path| containerd.path(path));
        walk(&run, &except, &mut |path, kind| {
            let path = path.strip_prefix(&run).unwrap_or(path);
            found.insert(format!("{kind} /run/{}", path.display()));
        });
        for cgroup in cgroups(containerd.token()) {
            found.insert(format!("cgroup {}", cgroup.display()));
        }
        for device in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
            found.insert(format!("network device {}", device.file_name().display()));
        }
        Self(found)
    }

    /// Lines that `after` has and this one has not.
    pub fn added(&self, after: &Self) -> Vec<String> {
        after.0.difference(&self.0).cloned().collect()
    }

    /// Fails if there is more now than when this was taken. What is still going away gets a moment to do so.
    pub fn expect_none_since(&self, containerd: &Containerd) -> Result<()> {
        self.expect_none_since_but(containerd, |_| false)
    }

    /// The same, not counting lines for which `excused` holds.
    pub fn expect_none_since_but(&self, containerd: &Containerd, excused: impl Fn(&str) -> bool) -> Result<()> {
        let started = Instant::now();
        loop {
            let mut added = self.added(&Self::now(containerd));
            added.retain(|line| !excused(line));
            if added.is_empty() {
                return Ok(());
            }
            if started.elapsed() > SETTLE {
                bail!("left behind {SETTLE:?} later:\n  {}\n{}", added.join("\n  "), containerd.log_tail());
            }
            // Nothing tells when the last of containerd's own asynchronous removals is done.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Folders of all cgroup hierarchies below a folder whose name contains `token`, parents first.
pub fn cgroups(token: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), &[], &mut |path, kind| {
        if kind == "folder" && path.to_string_lossy().contains(token) {
            found.push(path.to_path_buf());
        }
    });
    found
}

/// Visits everything below `folder` but `except`, parents first, not following links.
fn walk(folder: &Path, except: &[PathBuf], visit: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        visit(&path, if kind.is_dir() { "folder" } else { "file" });
        if kind.is_dir() && !except.contains(&path) {
            walk(&path, except, visit);
        }
    }
}
