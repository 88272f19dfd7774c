//! A folder that stands for a machine's root, with a static busybox, and this machine's libraries while a program runs.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::artifacts::repository;
use crate::command::{self, Output};

/// Deadline for a program.
const DEADLINE: Duration = Duration::from_secs(60);
/// Folders of this machine that programs need, visible only to them.
const SHARED: [(&str, &str); 4] = [("/usr/lib", "lib"), ("/lib64", "lib64"), ("/proc", "proc"), ("/dev", "dev")];

/// The folder.
pub struct Root {
    folder: tempfile::TempDir,
}

impl Root {
    /// Creates the folder, with `/bin/sh`, and `/etc`, `/opt` and `/test` empty.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("create a root folder")?;
        let root = Self { folder };
        for name in ["bin", "etc", "opt", "test", "lib", "lib64", "proc", "dev"] {
            fs::create_dir(root.path().join(name))?;
        }
        let mut null = Command::new("cp");
        null.args(["--archive", "/dev/null"]).arg(root.path().join("dev"));
        command::run(null, None, DEADLINE)?.ok()?;
        // dpkg's root folder is not private.
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755))?;
        let unpacked = command::run(Command::new(repository().join("rootfs/busybox")), None, DEADLINE)?.ok()?.text();
        fs::copy(&unpacked, root.path().join("bin/busybox")).with_context(|| format!("copy {unpacked}"))?;
        for applet in ["sh", "rm", "rmdir", "gunzip", "head", "grep", "kill", "cat"] {
            symlink("busybox", root.path().join("bin").join(applet))?;
        }
        Ok(root)
    }

    /// The folder's path on this machine.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a program of the folder with the folder as its root.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut chroot = vec!["chroot", self.path().to_str().context("a path in UTF-8")?];
        chroot.extend(arguments);
        self.beside(&chroot)
    }

    /// Runs a program of this machine while the folder has the machine's libraries.
    pub fn beside(&self, arguments: &[&str]) -> Result<Output> {
        let root = self.path().display();
        let mounts: Vec<String> =
            SHARED.iter().map(|(from, to)| format!("mount --rbind {from} {root}/{to} && ")).collect();
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "private", "sh", "-c"]);
        unshare.arg(format!("{}exec \"$@\"", mounts.concat())).arg("sh").args(arguments);
        command::run(unshare, None, DEADLINE)
    }

    /// Writes an executable script for the folder's `/bin/sh`.
    pub fn script(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Every path with its type, mode, owner, target and content, sorted. Leaves out `/var`, which is dpkg's, and
    /// `/test`.
    pub fn tree(&self) -> Result<Vec<String>> {
        let mut find = Command::new("sh");
        let script = "cd \"$0\" && find . \\( -path ./var -o -path ./test \\) -prune -o \
            \\( -type f -printf '%p %y %m %u %g ' -exec md5sum {} \\; -o -printf '%p %y %m %u %g %l\\n' \\)";
        find.arg("-c").arg(script).arg(self.path());
        let mut lines: Vec<String> =
            command::run(find, None, DEADLINE)?.ok()?.text().lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines)
    }
}
