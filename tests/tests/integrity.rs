//! What a disk has is what it should have, and what a scratch disk had stays secret.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::types::mount::Mount;
use husk_tests::artifacts::repository;
use husk_tests::bundle::{self, spec};
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::debug::run_in_vm;
use husk_tests::operator::{husk, husk_json};
use husk_tests::shim::Shim;
use husk_tests::verity::Tree;
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// Deadline for a program of this machine, and for what a guest does by itself.
const DEADLINE: Duration = Duration::from_secs(60);
/// The annotation by which containers share a sandbox.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// What the files of images begin with, to be found in the image.
const GOOD: &str = "the contents of the good file";
const BAD: &str = "the contents of the file that is changed";

/// Runs a shell script of this machine, with the programs of the tests.
fn sh(script: &str, arguments: &[&Path]) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).args(arguments);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:/usr/sbin:/sbin:{path}", repository().join(".cache/erofs").display()));
    Ok(command::run(command, None, DEADLINE)?.ok()?.text())
}

/// A folder with a static busybox and two files, which becomes an image.
fn tree(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("tree");
    let script = "mkdir -p \"$1/bin\" \"$1/proc\" \"$1/dev\" \"$1/sys\" \"$1/run\" \"$1/tmp\" \"$1/etc\" \"$1/volume\"
        cp \"$(\"$2\")\" \"$1/bin/busybox\"
        for applet in sh sleep cat true head; do ln -s busybox \"$1/bin/$applet\"; done";
    sh(script, &[&root, &repository().join("rootfs/busybox")])?;
    for (name, begin) in [("good", GOOD), ("bad", BAD)] {
        let mut contents = begin.as_bytes().to_vec();
        contents.resize(64 << 10, b'.');
        fs::write(root.join(name), contents)?;
    }
    Ok(root)
}

/// Changes one bit of a file in an image.
fn flip(image: &Path, what: &str) -> Result<()> {
    let bytes = fs::read(image)?;
    let at = bytes.windows(what.len()).position(|window| window == what.as_bytes());
    let at = at.with_context(|| format!("{} does not contain {what:?}", image.display()))?;
    Ok(File::options().write(true).open(image)?.write_all_at(&[bytes[at] ^ 1], at as u64)?)
}

fn layer(image: &Path) -> Mount {
    let options = vec!["ro".to_owned(), "loop".to_owned()];
    Mount { type_: "erofs".into(), source: image.display().to_string(), options, ..Default::default() }
}

/// A container of a pod, or the pod's sandbox container, in debug mode.
fn in_pod(pod: &str, id: &str, annotations: &[(&str, String)]) -> Value {
    let mut spec = spec(id, &SLEEP);
    let kind = if pod == id { "sandbox" } else { "container" };
    spec["annotations"] = json!({"io.husk.debug": "true", SANDBOX_ID: pod, "io.kubernetes.cri.container-type": kind});
    for (name, value) in annotations {
        spec["annotations"][*name] = value.as_str().into();
    }
    spec
}

/// The devices of the guest's device mapper.
fn mapped(containerd: &Containerd, pod: &str) -> Result<usize> {
    let listed = run_in_vm(containerd, pod, &["ls", "/sys/class/block"], None)?.ok()?.text();
    Ok(listed.split_whitespace().filter(|name| name.starts_with("dm-")).count())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_changed_bit_of_a_verified_image_is_an_error_and_a_line_of_the_log() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    sh("mkfs.erofs --quiet \"$1\" \"$2\"", &[&at("layer"), &tree(folder.path())?])?;
    sh("truncate -s %4096 \"$1\"", &[&at("layer")])?;
    let volume = "truncate -s 4M \"$1\"; mkfs.ext4 -q -F -b 4096 -O ^has_journal -d \"$2\" \"$1\"";
    sh(volume, &[&at("volume"), &at("tree")])?;
    let of_layer = Tree::append(&at("layer"))?;
    let of_volume = Tree::append(&at("volume"))?;
    fs::write(at("layer.dmverity"), of_layer.metadata())?;

    let configured = Configured::start(&format!("volume_dirs = [{:?}]\n", folder.path()))?;
    let containerd = &configured.containerd;
    let pod = containerd.id("pod");
    let pause = Shim::running(containerd, &pod, &in_pod(&pod, &pod, &[]))?;
    let volumes = |name: &str, tree: &Tree| {
        let volume = json!([{"source": at(name), "destination": "/volume", "read_only": true, "verity": tree.json()}]);
        [("io.husk.volumes", volume.to_string())]
    };
    let id = containerd.id("whole");
    let mut whole = Shim::start(containerd, &id, &in_pod(&pod, &id, &volumes("volume", &of_volume)))?;
    whole.bundle.rootfs = vec![layer(&at("layer"))];
    whole.run_detached()?;
    let read = "for file in /good /bad /volume/good /volume/bad; do head -c 23 $file && echo; done 2>&1";
    let seen = whole.script("read", read)?;
    ensure!(seen == format!("{0}\n{1}\n{0}\n{1}", &GOOD[..23], &BAD[..23]), "{seen}");
    let disks = husk_json(containerd, &["status", "--json", &pod])?["disks"].clone();
    let verified = disks.as_array().context("no disks")?.iter().filter(|disk| disk["protection"] == "verified");
    ensure!(verified.count() == 2 && mapped(containerd, &pod)? == 2, "{disks:#}");
    whole.remove()?;
    ensure!(mapped(containerd, &pod)? == 0);

    for name in ["layer", "volume"] {
        fs::copy(at(name), at(&format!("{name}.changed")))?;
        flip(&at(&format!("{name}.changed")), BAD)?;
    }
    fs::copy(at("layer.dmverity"), at("layer.changed.dmverity"))?;
    let id = containerd.id("changed");
    let mut changed = Shim::start(containerd, &id, &in_pod(&pod, &id, &volumes("volume.changed", &of_volume)))?;
    changed.bundle.rootfs = vec![layer(&at("layer.changed"))];
    changed.run_detached()?;
    let seen = changed.script("read", &format!("{read}; true"))?;
    let failed = |path: &str| format!("head: {path}: Input/output error");
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines == [&GOOD[..23], &failed("/bad"), &GOOD[..23], &failed("/volume/bad")], "{seen}");
    for disk in ["layer", "volume"] {
        let line = wait_for(DEADLINE, "the corrupt block is in the log", || {
            let log = husk(containerd, &["logs", &pod]).ok()?.text();
            log.lines().find(|line| line.contains("is corrupt") && line.contains(disk)).map(str::to_owned)
        })?;
        ensure!(line.contains("error") && line.contains("data block"), "{line}");
    }
    changed.remove()?;

    // The tree of another image.
    let id = containerd.id("other");
    let other = Shim::start(containerd, &id, &in_pod(&pod, &id, &volumes("volume", &of_layer)))?;
    let error = other.create_error()?;
    ensure!(error.contains("the superblock of the hash tree: ") && error.contains("/volume"), "{error}");
    let wrong = Tree { root_hash: of_layer.root_hash, ..of_volume };
    let id = containerd.id("wrong");
    let other = Shim::start(containerd, &id, &in_pod(&pod, &id, &volumes("volume", &wrong)))?;
    let error = other.create_error()?;
    ensure!(error.contains("mount /dev/dm-0 as ext4"), "{error}");
    ensure!(mapped(containerd, &pod)? == 0);
    pause.remove()
}

/// Where a pattern is in the scratch disk's image of a VM, which has no name.
fn scratch_contains(containerd: &Containerd, pod: &str, folder: &Path, pattern: &str) -> Result<bool> {
    let qemu = containerd.qemu_of(pod)?;
    for entry in fs::read_dir(format!("/proc/{}/fd", qemu.pid))? {
        let entry = entry?.path();
        // A descriptor may be closed meanwhile.
        let target = fs::read_link(&entry).unwrap_or_default();
        if target.starts_with(folder) && target.display().to_string().contains("deleted") {
            let bytes = fs::read(&entry)?;
            return Ok(bytes.windows(pattern.len()).any(|window| window == pattern.as_bytes()));
        }
    }
    anyhow::bail!("QEMU has no scratch disk")
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_host_finds_nothing_of_an_encrypted_scratch_disk() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let configured = Configured::start(&format!("scratch_dir = {:?}\n", folder.path()))?;
    let containerd = &configured.containerd;
    let pattern = "a secret that is long enough to be found";
    for encrypted in [false, true] {
        let pod = containerd.id("pod");
        let pause = Shim::running(containerd, &pod, &in_pod(&pod, &pod, &[]))?;
        let scratch = [("io.husk.scratch_mib", "64".to_owned()), ("io.husk.scratch_encrypted", encrypted.to_string())];
        let id = containerd.id("app");
        let app = Shim::running(containerd, &id, &in_pod(&pod, &id, &scratch))?;
        let script = format!(
            "for n in 1 2 3; do echo '{pattern}' > /scratch/$n; done; mkdir /scratch/folder; cp /bin/busybox /scratch/folder/; \
            sync; echo 3 > /proc/sys/vm/drop_caches 2>/dev/null; cat /scratch/2; cmp /bin/busybox /scratch/folder/busybox && echo same; \
            df -m /scratch | tail -1 | awk '{{ print ($2 > 50) }}'; \
            dd if=/dev/zero of=/scratch/fill bs=1M 2>&1 | grep -o 'No space left'; rm /scratch/fill; sync; cat /scratch/3"
        );
        let seen = app.script("write", &script)?;
        ensure!(seen == format!("{pattern}\nsame\n1\nNo space left\n{pattern}"), "{seen}");
        let found = scratch_contains(containerd, &pod, folder.path(), pattern)?;
        ensure!(found != encrypted, "encrypted: {encrypted}, found on the host: {found}");
        // The filesystem itself is encrypted, too.
        let names = scratch_contains(containerd, &pod, folder.path(), "lost+found")?;
        ensure!(names != encrypted, "encrypted: {encrypted}, names are on the host: {names}");
        ensure!(mapped(containerd, &pod)? == usize::from(encrypted));
        // A container that insists on encryption does not get the other disk.
        let id = containerd.id("second");
        let strict = [scratch[0].clone(), ("io.husk.scratch_encrypted", "true".to_owned())];
        let second = Shim::start(containerd, &id, &in_pod(&pod, &id, &strict))?;
        if encrypted {
            second.run_detached()?;
            ensure!(second.script("read", "cat /scratch/1")? == pattern);
            second.remove()?;
        } else {
            let error = second.create_error()?;
            ensure!(error.contains("which is not encrypted"), "{error}");
        }
        app.remove()?;
        ensure!(mapped(containerd, &pod)? == 0);
        pause.remove()?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_disk_that_a_program_keeps_does_not_stand_in_the_way_of_others() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let configured = Configured::start(&format!("volume_dirs = [{:?}]\n", folder.path()))?;
    let containerd = &configured.containerd;
    let volume = |name: &str| {
        let volume = json!([{"source": folder.path().join(name), "destination": "/data", "size_mib": 16}]);
        [("io.husk.volumes", volume.to_string())]
    };
    let pod = containerd.id("pod");
    let pause = Shim::running(containerd, &pod, &in_pod(&pod, &pod, &[]))?;
    let disks = || {
        let listed = run_in_vm(containerd, &pod, &["ls", "/sys/class/block"], None)?.ok()?.text();
        Ok::<_, anyhow::Error>(listed.split_whitespace().filter(|name| name.starts_with("sd")).count())
    };
    let id = containerd.id("app");
    let app = Shim::running(containerd, &id, &in_pod(&pod, &id, &volume("a.img")))?;
    // It mounts the disk a second time, and so keeps it when the container that has the volume is deleted.
    let id = containerd.id("keeper");
    let mut keeper = in_pod(&pod, &id, &[]);
    let keep = "mkdir /tmp/kept && mknod /tmp/disk b $(cat /sys/class/block/sda/dev | tr : ' ') && \
        mount -t ext4 /tmp/disk /tmp/kept && exec sleep 1000";
    keeper["process"]["args"] = json!(["sh", "-c", keep]);
    for set in ["bounding", "effective", "permitted"] {
        bundle::append(&mut keeper, &format!("/process/capabilities/{set}"), [json!("CAP_SYS_ADMIN")]);
    }
    bundle::append(&mut keeper, "/linux/resources/devices", [json!({"allow": true, "access": "rwm"})]);
    let keeper = Shim::running(containerd, &id, &keeper)?;
    let mut looks = 0;
    wait_for(DEADLINE, "the disk is mounted twice", || {
        looks += 1;
        keeper.script(&format!("look-{looks}"), "grep -q ' /tmp/kept ext4' /proc/mounts && echo mounted").ok()
    })?;
    app.remove()?;
    ensure!(disks()? == 1, "the guest has let go of a disk that is in use");
    // The next disk has the number of the one that is gone.
    for round in 0..2 {
        let id = containerd.id("next");
        let next = Shim::running(containerd, &id, &in_pod(&pod, &id, &volume("b.img")))?;
        let seen = next.script("use", "echo x >> /data/x; cat /data/x")?;
        ensure!(seen == ["x"; 2][..round + 1].join("\n") && disks()? == 1, "{seen}: {}", disks()?);
        next.remove()?;
        ensure!(disks()? == 0);
    }
    keeper.remove()?;
    pause.remove()
}
