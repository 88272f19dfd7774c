//! What the filesystems of a container can and cannot do, compared with runc and with docs/filesystems.md.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::operator::husk_json;

/// virtiofsd's limit of open files in the test of it, and how many files the walked tree has.
const OPEN_FILES: u64 = 2048;
const TREE: usize = 4000;

/// `--mount` of a host path.
fn bind(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

/// How many files virtiofsd has open for a container's VM, and how many it may have.
fn open_files(containerd: &Containerd, container: &Container<'_>) -> Result<(u64, u64)> {
    let status = husk_json(containerd, &["status", container.id(), "--json"])?;
    let files = |key: &str| status["files"][key].as_u64().with_context(|| format!("no files.{key} in {status}"));
    Ok((files("open")?, files("limit")?))
}

#[test]
fn programs_still_start_after_a_walk_over_more_files_than_virtiofsd_may_have_open() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for n in 0..TREE {
        let below = folder.path().join((n % 40).to_string());
        fs::create_dir_all(&below)?;
        fs::write(below.join(n.to_string()), "")?;
    }
    let configured = Configured::start(&format!("virtiofsd_open_files = {OPEN_FILES}\n"))?;
    let containerd = &configured.containerd;
    let mount = bind(folder.path(), "/tree", "rbind:rw");
    let container = containerd.detached(&["--mount", &mount], "walk", &["sleep", "600"])?;
    // `-size` looks at each file. Each round starts programs.
    let walk = "for round in 1 2; do find /tree -type f -size -1 | wc -l; done; find / -xdev | wc -l > /dev/null; \
        for file in /tree/1/*; do exec 9<$file; done; echo done";
    let walked = container.script(walk)?;
    ensure!(walked.split_whitespace().eq([TREE.to_string().as_str(), TREE.to_string().as_str(), "done"]), "{walked}");
    let (open, limit) = open_files(containerd, &container)?;
    ensure!(limit == OPEN_FILES && open < limit, "{open} of {limit}");
    Ok(())
}

#[test]
fn debug_x() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for n in 0..TREE {
        let below = folder.path().join((n % 40).to_string());
        fs::create_dir_all(&below)?;
        fs::write(below.join(n.to_string()), "")?;
    }
    let configured = Configured::start(&format!("virtiofsd_open_files = {OPEN_FILES}\n"))?;
    let containerd = &configured.containerd;
    let mount = bind(folder.path(), "/tree", "rbind:rw");
    let container = containerd.detached(&["--mount", &mount], "walk", &["sleep", "600"])?;
    for script in [
        "cat /sys/module/virtiofs/parameters/max_inodes; grep -a . /proc/cmdline; cat /proc/sys/fs/dentry-state; grep -i fuse_inode /proc/slabinfo",
        "find /tree/1 /tree/2 /tree/3 /tree/4 /tree/5 -type f -size -1 | wc -l; cat /proc/sys/fs/dentry-state",
        "find /tree/6 /tree/7 /tree/8 /tree/9 /tree/10 -type f -size -1 | wc -l; cat /proc/sys/fs/dentry-state",
        "find /tree/6 /tree/7 /tree/8 /tree/9 /tree/10 -type f -size -1 | wc -l; cat /proc/sys/fs/dentry-state",
    ] {
        println!("{}", container.exec(&["sh", "-c", script]).output()?);
        println!("{:?}", open_files(containerd, &container)?);
    }
    Ok(())
}
