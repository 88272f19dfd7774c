//! What programs need of the guest's kernel, and how it caches the host's files. kernel-config/README.md has the list.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::husk_only;

/// Much more than a guest reads of its own accord.
const SIZE: usize = 4 << 20;

/// Bytes that the container's virtiofsd has read from files.
fn read_from_host(container: &Container, containerd: &Containerd) -> Result<usize> {
    let (_, below) = containerd.shim_of(container.id())?;
    let mut sum = 0;
    for process in below.iter().filter(|process| process.name.starts_with("virtiofsd")) {
        let io = fs::read_to_string(format!("/proc/{}/io", process.pid))?;
        let read = io.lines().find_map(|line| line.strip_prefix("rchar: ")).context("no rchar in /proc/PID/io")?;
        sum += read.parse::<usize>()?;
    }
    ensure!(sum > 0, "no virtiofsd below the shim: {below:#?}");
    Ok(sum)
}

/// Writes the mark at the file's start and leaves its size and mtime.
fn overwrite(path: &Path, mark: &str) -> Result<()> {
    let mut file = fs::File::options().write(true).open(path)?;
    let modified = file.metadata()?.modified()?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(mark.as_bytes())?;
    Ok(file.set_modified(modified)?)
}

#[test]
fn an_open_sees_what_the_host_has_written_and_unchanged_files_are_not_read_again() -> Result<()> {
    husk_only!();
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("data");
    fs::write(&path, vec![b'-'; SIZE])?;
    overwrite(&path, "first")?;
    let shared = format!("type=bind,src={},dst=/shared,options=rbind:rw", folder.path().display());
    let sysfs = "type=bind,src=/sys/kernel,dst=/host,options=rbind:ro";
    let container = containerd.detached(&["--mount", &shared, "--mount", sysfs], "pages", &["sleep", "1000"])?;
    let script = "wc -c </shared/data; head -c 6 /shared/data";
    let shown = || container.script(script);
    let expected = |mark: &str, size| format!("{size}\n{mark}-");
    ensure!(shown()? == expected("first", SIZE));

    // Not while the ctime is so recent that the next change could leave it as it is.
    let reads = || -> Result<usize> {
        let before = read_from_host(&container, containerd)?;
        let shown = container.script("cat /shared/data >/dev/null; cat /shared/data | tail -c 1")?;
        ensure!(shown == "-", "{shown}");
        Ok(read_from_host(&container, containerd)? - before)
    };
    let what = "opens of an unchanged file cause no reads";
    wait_for(Duration::from_secs(60), what, || reads().map(|read| (read < SIZE / 2).then_some(())).transpose())??;

    overwrite(&path, "later")?;
    ensure!(shown()? == expected("later", SIZE), "after a change that leaves size and mtime: {}", shown()?);
    // The container reads between two changes that follow each other closely.
    for mark in ["fast1", "fast2", "fast3"] {
        overwrite(&path, mark)?;
        ensure!(shown()? == expected(mark, SIZE), "after one of several changes in a row: {}", shown()?);
    }
    fs::File::options().append(true).open(&path)?.write_all(b"more")?;
    ensure!(shown()? == expected("fast3", SIZE + 4), "after the file has grown: {}", shown()?);
    fs::write(&path, "short-")?;
    ensure!(shown()? == expected("short", 6), "after the file has been truncated: {}", shown()?);
    // The container's own changes, and the host's after them.
    let shown = container.script("echo -n inner- >/shared/data; wc -c </shared/data; cat /shared/data")?;
    ensure!(shown == expected("inner", 6) && fs::read_to_string(&path)? == "inner-", "{shown}");
    overwrite(&path, "outer")?;
    ensure!(container.script(script)? == expected("outer", 6), "after changes on both sides");

    // sysfs generates its files when they are read, and leaves their times.
    let sequence = || -> Result<u64> { Ok(container.script("cat /host/uevent_seqnum")?.parse()?) };
    let before = sequence()?;
    ensure!(Command::new("unshare").args(["--net", "true"]).status()?.success());
    ensure!(sequence()? > before, "a file of the host's sysfs does not change");
    Ok(())
}
