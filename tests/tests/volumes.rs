//! Containers of one pod: what they share through a folder of the host, and what they leave behind when they go.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::compare::{self, same};
use husk_tests::containerd::Containerd;
use husk_tests::debug::run_in_vm;
use husk_tests::shim::{Shim, Streams};
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

/// Deadline for what the guest reports to virtiofsd without waiting for an answer.
const FORGOTTEN: Duration = Duration::from_secs(30);
const SLEEP: [&str; 2] = ["sleep", "1000"];

/// The spec of a container of a pod, which the CRI plugin identifies by this annotation.
fn spec(pod: &str, id: &str, args: &[&str], mounts: Vec<Value>) -> Value {
    let mut spec = bundle::spec(id, args);
    spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": pod, "io.husk.debug": "true"});
    bundle::append(&mut spec, "/mounts", mounts);
    spec
}

fn bind(source: &Path, destination: &str, access: &str) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access]})
}

/// What containers find of each other in one folder, and the mounts of a pod's shared memory.
#[test]
fn containers_of_a_pod_share_sockets_locks_fifos_and_memory_in_a_folder() -> Result<()> {
    let program = guest_program("sharing")?;
    let seen = same(|containerd| {
        // A tmpfs of the host, as the CRI plugin makes one for the /dev/shm of each pod.
        let pod = containerd.id("shares");
        let shm = Path::new("/run").join(&pod);
        containerd.sh(&format!("mkdir {0} && mount -t tmpfs -o mode=1777 shm {0}", shm.display()))?;
        let folder = tempfile::tempdir()?;
        let tool = || bind(&program, "/sharing", "ro");
        let reader = || vec![tool(), bind(&shm, "/dev/shm", "ro"), bind(folder.path(), "/data", "ro")];
        // The pod's first container only reads, like the CRI plugin's pause container: the folders become writable
        // while it runs.
        let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &SLEEP, reader()))?;
        let mut seen = pause.script("denied", "touch /data/x /dev/shm/x 2>&1 || echo; ls /data /dev/shm")?;
        let writer_id = containerd.id("writer");
        let twice = vec![
            tool(),
            bind(&shm, "/dev/shm", "rw"),
            bind(folder.path(), "/data", "rw"),
            bind(folder.path(), "/again", "rw"),
        ];
        let writer = Shim::running(containerd, &writer_id, &spec(&pod, &writer_id, &SLEEP, twice))?;
        let late_id = containerd.id("late");
        let late = Shim::running(containerd, &late_id, &spec(&pod, &late_id, &SLEEP, reader()))?;

        for (name, from, see_in) in [("data", "/data", "/again"), ("shm", "/dev/shm", "/dev/shm")] {
            let (io, mut output, _errors) = writer.streams(name)?;
            writer.start_exec(name, &bundle::process(&["/sharing", "hold", from]), &io)?;
            output.read_until("holding\n", FORGOTTEN)?;
            for (who, shim, place) in [("pause", &pause, from), ("late", &late, from)] {
                let saw = shim.exec_process(who, &bundle::process(&["/sharing", "see", place]))?;
                seen += &format!("{name}, {who}: {saw:?}\n");
            }
            let answered = writer.exec_process("answer", &bundle::process(&["/sharing", "answer", see_in]))?;
            let status = writer.task.wait(&writer_id, name)?;
            let rest = String::from_utf8(output.read_to_end(FORGOTTEN)?)?;
            seen += &format!("{name}, answer: {answered:?}, holder: {status} {rest}\n");
            writer.task.delete(&writer_id, name)?;
        }
        // Nobody may write any more after the writer is gone, but its files stay.
        writer.remove()?;
        seen += &late.script("after", "ls /data /dev/shm; touch /data/x 2>&1 || echo")?;
        late.remove()?;
        drop(pause);
        containerd.sh(&format!("umount {0} && rmdir {0}", shm.display()))?;
        Ok(seen)
    })?;
    for expected in ["data, late: (0, \"flock: busy\\nfcntl: busy\\nmemory: h\"", "socket: through the socket"] {
        ensure!(seen.contains(expected), "{expected}\n{seen}");
    }
    Ok(())
}

/// The guest's own mounts, which contain no container's.
fn mounts_of_guest(containerd: &Containerd, pod: &str) -> Result<Vec<String>> {
    let output = run_in_vm(containerd, pod, &["cat", "/proc/mounts"], None)?.ok()?.text();
    Ok(output.lines().map(str::to_owned).collect())
}

/// The files that virtiofsd has open.
fn open_files(containerd: &Containerd, pod: &str) -> Result<usize> {
    let (_, below) = containerd.shim_of(pod)?;
    let open = below.iter().filter(|process| process.name.starts_with("virtiofsd"));
    open.map(|process| Ok(fs::read_dir(format!("/proc/{}/fd", process.pid))?.count())).sum()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn twenty_restarts_of_a_container_leave_nothing_in_the_guest_or_in_virtiofsd() -> Result<()> {
    let containerd = compare::tested()?;
    let (pod, id) = (containerd.id("restarts"), containerd.id("again"));
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "text")?;
    let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &SLEEP, Vec::new()))?;
    let state = containerd.path("/run/husk/husk-test").join(&pod);
    let shares = || -> Result<usize> { Ok(fs::read_dir(state.join("skeleton"))?.count()) };
    let (mounts, entries) = (mounts_of_guest(containerd, &pod)?, shares()?);
    let cgroups = run_in_vm(containerd, &pod, &["ls", "/sys/fs/cgroup/containers"], None)?.ok()?.text();
    let before = open_files(containerd, &pod)?;
    for round in 0..20 {
        let binds = vec![bind(folder.path(), "/data", "rw"), bind(&folder.path().join("file"), "/etc/file", "ro")];
        // Always the same id. The walk makes virtiofsd open what it finds.
        let script = "find / -xdev > /dev/null; find /data > /etc/found; dd if=/dev/zero of=/big bs=1M count=4 \
            2> /dev/null; exec sleep 1000";
        let shim = Shim::start(containerd, &id, &spec(&pod, &id, &["sh", "-c", script], binds))?;
        shim.create_and_start(&Streams::default()).with_context(|| format!("round {round}"))?;
        // Deletion is quick, or some time after the walk.
        if round % 2 == 0 {
            ensure!(shim.exec("look", &["cat", "/etc/file"])? == (0, "text".to_owned()), "round {round}");
        }
        shim.remove()?;
    }
    let left = mounts_of_guest(containerd, &pod)?;
    ensure!(left == mounts, "the guest's mounts: {left:#?}\nbefore: {mounts:#?}");
    ensure!(shares()? == entries, "{} entries of the share, before {entries}", shares()?);
    let now = run_in_vm(containerd, &pod, &["ls", "/sys/fs/cgroup/containers"], None)?.ok()?.text();
    ensure!(now == cgroups, "cgroups: {now}, before {cgroups}");
    let closed = || open_files(containerd, &pod).ok().filter(|open| *open <= before);
    wait_for(FORGOTTEN, "virtiofsd has closed the containers' files", closed)
        .with_context(|| format!("before: {before}, now: {:?}", open_files(containerd, &pod)))?;
    // An operator finds a container's files by its id.
    run_in_vm(containerd, &pod, &["ls", &format!("/run/husk/bundles/{pod}/rootfs/etc/passwd")], None)?.ok()?;
    drop(pause);
    Ok(())
}

/// The files in a folder: type, mode, owner, device number and size. Folders have different sizes on different
/// filesystems.
fn listing(folder: &Path, below: &Path, lines: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder.join(below))? {
        let path = below.join(entry?.file_name());
        let metadata = fs::symlink_metadata(folder.join(&path))?;
        let kind = metadata.file_type();
        let size = if kind.is_file() { metadata.len() } else { 0 };
        let device = if kind.is_char_device() || kind.is_block_device() { metadata.rdev() } else { 0 };
        let (mode, owner) = (metadata.mode(), (metadata.uid(), metadata.gid()));
        lines.push(format!("{} {mode:o} {owner:?} {device} {size}", path.display()));
        if kind.is_dir() {
            listing(folder, &path, lines)?;
        }
    }
    Ok(())
}

#[test]
fn a_create_leaves_in_the_root_filesystem_what_it_leaves_under_runc() -> Result<()> {
    let left = same(|containerd| {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("file");
        fs::write(&file, "text")?;
        let id = containerd.id("left");
        let mut spec = bundle::spec(&id, &["sh", "-c", "echo > /tmp/mine"]);
        let mounts = [
            bind(folder.path(), "/new/folder", "rw"),
            bind(&file, "/new/file", "ro"),
            bind(&file, "/etc/hostname", "ro"),
            bind(&file, "/dev/termination-log", "rw"),
            json!({"destination": "/new/tmpfs/deep", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}),
        ];
        bundle::append(&mut spec, "/mounts", mounts);
        spec["process"]["cwd"] = json!("/work/here");
        spec["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
        let shim = Shim::start(containerd, &id, &spec)?;
        let run = shim.run()?;
        ensure!(run.0 == 0, "{run:?}");
        let mut lines = Vec::new();
        listing(&shim.bundle.outside.join("upper"), Path::new(""), &mut lines)?;
        lines.sort();
        shim.shutdown();
        Ok(lines.join("\n"))
    })?;
    ensure!(left.contains("tmp/mine") && left.contains("new/tmpfs/deep"), "{left}");
    Ok(())
}
