//! Disks: volumes, block devices and scratch space; their locks, their removal, and what survives a crash.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::debug::run_in_vm;
use husk_tests::operator::husk_json;
use husk_tests::shim::Shim;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];
/// Deadline for a VM to end, and for its shim to notice it.
const END: Duration = Duration::from_secs(30);

/// A containerd that allows volumes in a folder.
struct Host {
    folder: tempfile::TempDir,
    configured: Configured,
}

impl Host {
    fn start(more: &str) -> Result<Self> {
        Self::with(tempfile::tempdir()?, more)
    }

    fn with(folder: tempfile::TempDir, more: &str) -> Result<Self> {
        let config = format!("volume_dirs = [{0:?}]\nscratch_dir = {0:?}\n{more}", folder.path());
        Ok(Self { configured: Configured::start(&config)?, folder })
    }

    fn containerd(&self) -> &Containerd {
        &self.configured.containerd
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn volume(&self, name: &str, destination: &str, mib: u64) -> Value {
        json!({"source": self.file(name), "destination": destination, "size_mib": mib})
    }
}

/// The spec of a container of a pod with these volumes, or of the pod's sandbox container.
fn spec(pod: &str, id: &str, volumes: &[Value]) -> Value {
    let mut spec = alone(id, volumes);
    spec["annotations"]["io.kubernetes.cri.sandbox-id"] = pod.into();
    spec["annotations"]["io.kubernetes.cri.container-type"] = if pod == id { "sandbox" } else { "container" }.into();
    spec
}

/// The spec of a container with a VM of its own.
fn alone(id: &str, volumes: &[Value]) -> Value {
    let mut spec = bundle::spec(id, &SLEEP);
    let volumes = Value::from(volumes.to_vec()).to_string();
    spec["annotations"] = json!({"io.husk.debug": "true", "io.husk.volumes": volumes});
    spec
}

/// Runs the container of another shim and returns why it was not created.
fn refused(host: &Host, name: &str, spec: impl Fn(&str) -> Value) -> Result<String> {
    let id = host.containerd().id(name);
    let shim = Shim::start(host.containerd(), &id, &spec(&id))?;
    shim.create_error()
}

/// Kills a process and waits until it is gone.
fn kill_9(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait_for(END, "the killed process is gone", || {
        let gone = husk_tests::process::Process::read(pid).is_none_or(|process| process.zombie);
        gone.then_some(())
    })
}

/// The images that a VM's machine has open.
fn images_of(host: &Host, pod: &str) -> Result<usize> {
    let qemu = host.containerd().qemu_of(pod)?;
    // QEMU may have several descriptors of one image.
    let mut images = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", qemu.pid))? {
        // A descriptor may be closed meanwhile.
        images.extend(fs::read_link(entry?.path()).ok().filter(|target| target.starts_with(host.folder.path())));
    }
    Ok(images.len())
}

/// The disks of the guest's kernel.
fn disks_in_guest(host: &Host, pod: &str) -> Result<usize> {
    let listed = run_in_vm(host.containerd(), pod, &["ls", "/sys/class/block"], None)?.ok()?.text();
    Ok(listed.split_whitespace().filter(|name| name.starts_with("sd")).count())
}

/// Checks an ext4 filesystem, which must be clean.
fn fsck(image: &Path) -> Result<()> {
    let output = Command::new("e2fsck").args(["-fn"]).arg(image).output().context("run e2fsck")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && !text.contains("recovering journal"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_volume_keeps_its_files_and_grows_and_belongs_to_one_vm_at_a_time() -> Result<()> {
    let host = Host::start("")?;
    let containerd = host.containerd();
    let (pod, id) = (containerd.id("volume"), containerd.id("app"));
    let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &[]))?;
    let volumes = [host.volume("a.img", "/data", 64), host.volume("b.img", "/data/below", 16)];
    let mut with_mount = spec(&pod, &id, &volumes);
    // Below a volume.
    let below = host.file("host");
    fs::create_dir(&below)?;
    fs::write(below.join("of-host"), "")?;
    let bind = json!({"destination": "/data/host", "type": "bind", "source": below, "options": ["rbind", "ro"]});
    bundle::append(&mut with_mount, "/mounts", [bind]);
    let app = Shim::running(containerd, &id, &with_mount)?;
    let seen = app.script(
        "write",
        "ls /data/host; echo one > /data/file; echo two > /data/below/file; sync; \
        grep -c ' /data ext4 rw' /proc/mounts; stat -f -c %T /data; ls /scratch 2>&1 || true",
    )?;
    ensure!(seen.contains("of-host\n1\n") && seen.contains("No such file"), "{seen}");

    // Another VM is told who has the volume.
    let error = refused(&host, "second", |id| alone(id, &volumes[..1]))?;
    let expected = format!("in use by the VM of sandbox {pod} in namespace husk-test");
    ensure!(error.contains(&expected) && error.contains("a.img"), "{error}");
    // A container of the same pod shares it.
    let side_id = containerd.id("side");
    let side = Shim::running(containerd, &side_id, &spec(&pod, &side_id, &volumes[..1]))?;
    ensure!(side.script("read", "cat /data/file")?.contains("one"));
    let status = husk_json(containerd, &["status", "--json", &pod])?;
    let disks = status["disks"].as_array().context("no disks")?;
    ensure!(disks.len() == 2 && disks[0]["containers"] == json!([id, side_id]), "{disks:?}");
    ensure!(disks[0]["path"] == json!(host.file("a.img")) && disks[0]["state"] == "mounted", "{disks:?}");
    side.remove()?;
    ensure!(images_of(&host, &pod)? == 2 && disks_in_guest(&host, &pod)? == 2);

    // While its container is paused, the filesystem on the host is complete.
    app.task.pause(&id)?;
    let copy = host.file("copy.img");
    fs::copy(host.file("a.img"), &copy)?;
    fsck(&copy)?;
    app.task.resume(&id)?;
    ensure!(app.script("after", "echo three >> /data/file; cat /data/file")?.contains("one\nthree"));
    // A paused container ends too.
    app.task.pause(&id)?;
    app.remove()?;
    ensure!(images_of(&host, &pod)? == 0 && disks_in_guest(&host, &pod)? == 0);
    fsck(&host.file("a.img"))?;

    // Larger, on request only.
    let error = refused(&host, "larger", |id| alone(id, &[host.volume("a.img", "/data", 128)]))?;
    ensure!(error.contains("less than size_mib = 128 requests"), "{error}");
    let mut larger = host.volume("a.img", "/data", 128);
    larger["grow"] = true.into();
    let again_id = containerd.id("again");
    let again = Shim::running(containerd, &again_id, &spec(&pod, &again_id, &[larger]))?;
    let seen = again.script("grown", "cat /data/file; df -m /data | tail -1 | awk '{ print ($2 > 100) }'")?;
    ensure!(seen.ends_with("one\nthree\n1"), "{seen}");
    again.remove()?;
    fsck(&host.file("a.img"))?;

    // Elsewhere, or with somebody's data, nothing becomes a volume.
    let outside = tempfile::tempdir()?;
    let elsewhere = json!({"source": outside.path().join("x.img"), "destination": "/data"});
    let error = refused(&host, "elsewhere", |id| alone(id, std::slice::from_ref(&elsewhere)))?;
    ensure!(error.contains("add one to the key volume_dirs") && !outside.path().join("x.img").exists(), "{error}");
    let mut precious = vec![0; 16 << 20];
    precious[(16 << 20) - 1] = b'x';
    fs::write(host.file("precious.img"), &precious)?;
    let data_id = containerd.id("data");
    let data = Shim::start(containerd, &data_id, &spec(&pod, &data_id, &[host.volume("precious.img", "/data", 16)]))?;
    let error = data.create_error()?;
    ensure!(error.contains("it has no valid ext4 filesystem"), "{error}");
    ensure!(fs::read(host.file("precious.img"))? == precious, "the data has changed");
    ensure!(images_of(&host, &pod)? == 0 && disks_in_guest(&host, &pod)? == 0);
    pause.remove()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn what_was_synced_to_a_volume_survives_kill_9_of_the_vm_and_of_the_shim() -> Result<()> {
    let host = Host::start("")?;
    let containerd = host.containerd();
    for round in 0..4 {
        let id = containerd.id("crash");
        let shim = Shim::running(containerd, &id, &alone(&id, &[host.volume("a.img", "/data", 32)]))?;
        let seen = shim.script("read", "cat /data/rounds 2>/dev/null; echo end")?;
        let expected: String = (0..round).map(|round| format!("{round}\n")).collect();
        ensure!(seen.contains(&format!("{expected}end")), "round {round}: {seen}");
        shim.script(
            "write",
            &format!("echo {round} >> /data/rounds && sync && dd if=/dev/zero of=/data/more bs=1M count=4"),
        )?;
        let (of_shim, _) = containerd.shim_of(&id)?;
        let qemu = containerd.qemu_of(&id)?;
        if round % 2 == 0 {
            kill_9(qemu.pid)?;
            shim.task.wait(&id, "")?;
            shim.task.delete(&id, "")?;
        } else {
            kill_9(of_shim.pid)?;
            shim.delete_action()?;
        }
        // Nothing of the VM has the image.
        wait_for(END, "QEMU is gone", || {
            husk_tests::process::Process::read(qemu.pid).is_none_or(|process| process.zombie).then_some(())
        })?;
        let leases = containerd.path("/run/husk/.images");
        wait_for(END, "the lease of the image is released", || (!leases.exists()).then_some(()))?;
    }
    Ok(())
}

/// Runs a program of this machine, which may fail, and returns all output.
fn said(program: &str, args: &[&Path]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("run {program}"))?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// A filesystem of this machine, unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // What fails here shows when the folder is removed.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_full_disk_of_the_host_is_an_error_for_the_program_and_harms_nothing_else() -> Result<()> {
    let outside = tempfile::tempdir()?;
    let image = outside.path().join("small.img");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let said_by = |program: &str, args: &[&Path]| -> Result<()> {
        let text = said(program, args)?;
        ensure!(text.is_empty(), "{program}: {text}");
        Ok(())
    };
    said_by("mkfs.ext4", &[Path::new("-q"), &image])?;
    let folder = tempfile::tempdir()?;
    said_by("mount", &[Path::new("-o"), Path::new("loop"), &image, folder.path()])?;
    let _mounted = Mounted(folder.path().to_owned());
    let host = Host::with(folder, "")?;
    let containerd = host.containerd();
    // Less than the filesystem of the host has.
    let ballast = host.file("ballast");
    fs::write(&ballast, vec![1; 32 << 20])?;
    let volume = host.volume("a.img", "/data", 256);
    let id = containerd.id("full");
    let shim = Shim::running(containerd, &id, &alone(&id, std::slice::from_ref(&volume)))?;
    let fill =
        "echo kept > /data/kept; sync; dd if=/dev/zero of=/data/fill bs=1M count=64 conv=fsync 2>&1 && echo written";
    let seen = shim.script("fill", &format!("{fill}; true"))?;
    ensure!(seen.contains("dd: ") && !seen.contains("written"), "{seen}");
    // Whether other files of the volume can be read depends on what the filesystem could not write.
    ensure!(shim.script("alive", "cat /etc/hostname; echo alive")?.ends_with("alive"));
    let status = husk_json(containerd, &["status", "--json", &id])?;
    ensure!(status["state"] == "Running", "{status}");
    shim.remove()?;
    // With space, the volume is as it was.
    fs::remove_file(&ballast)?;
    let again_id = containerd.id("again");
    let again = Shim::running(containerd, &again_id, &alone(&again_id, std::slice::from_ref(&volume)))?;
    let seen = again.script("again", "cat /data/kept; echo more > /data/more && sync && cat /data/more")?;
    ensure!(seen == "kept\nmore", "{seen}");
    again.remove()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn space_that_the_guest_discards_is_free_on_the_host() -> Result<()> {
    // On a disk that can punch holes.
    let host = Host::with(tempfile::tempdir_in("/var/tmp")?, "")?;
    let containerd = host.containerd();
    let id = containerd.id("discard");
    let mut spec = alone(&id, &[host.volume("a.img", "/data", 256)]);
    // FITRIM needs it.
    for set in ["bounding", "effective", "permitted"] {
        bundle::append(&mut spec, &format!("/process/capabilities/{set}"), [json!("CAP_SYS_ADMIN")]);
    }
    let shim = Shim::running(containerd, &id, &spec)?;
    let taken = || Ok::<_, anyhow::Error>(fs::metadata(host.file("a.img"))?.blocks() * 512);
    let process = |script: &str| {
        let mut process = bundle::process(&["sh", "-c", script]);
        process["capabilities"] = spec["process"]["capabilities"].clone();
        process
    };
    let write = "dd if=/dev/urandom of=/data/fill bs=1M count=32 conv=fsync 2>&1";
    let (status, out, err) = shim.exec_process("write", &process(write))?;
    let written = taken()?;
    ensure!(status == 0 && written >= 32 << 20, "{written}: {out}{err}");
    let (status, out, err) = shim.exec_process("trim", &process("rm /data/fill && sync && fstrim /data"))?;
    let left = taken()?;
    ensure!(status == 0 && left + (28 << 20) <= written, "{written} -> {left}: {out}{err}");
    shim.remove()
}

/// A loop device of the host, detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn of(image: &Path) -> Result<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(image).output().context("run losetup")?;
        ensure!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(PathBuf::from(String::from_utf8(output.stdout)?.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The machine would keep the device otherwise; a failure shows in the next losetup.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn block_devices_and_scratch_space_are_the_containers_own_and_leave_nothing() -> Result<()> {
    let host = Host::start("")?;
    let containerd = host.containerd();
    let image = host.file("device.img");
    fs::File::create(&image)?.set_len(8 << 20)?;
    let device = Loop::of(&image)?;
    let metadata = fs::metadata(&device.0)?;
    ensure!(metadata.file_type().is_block_device());
    let (major, minor) = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
    let with_device = |id: &str, access: &str| {
        let mut spec = bundle::spec(id, &SLEEP);
        spec["annotations"] = json!({"io.husk.scratch_mib": "32"});
        let node = json!({"path": "/dev/xvda", "type": "b", "major": major, "minor": minor, "fileMode": 0o660, "uid": 0, "gid": 0});
        spec["linux"]["devices"] = json!([node]);
        let rule = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
        bundle::append(&mut spec, "/linux/resources/devices", [rule]);
        spec
    };
    let id = containerd.id("device");
    let shim = Shim::running(containerd, &id, &with_device(&id, "rwm"))?;
    let seen = shim.script(
        "use",
        "ls -l /dev/xvda | cut -c1; echo from the container | dd of=/dev/xvda conv=fsync 2>/dev/null; \
         blockdev --getsize64 /dev/xvda; df -m /scratch | tail -1 | awk '{ print ($2 > 20 && $2 < 33) }'; \
         dd if=/dev/zero of=/scratch/fill bs=1M 2>&1 | grep -o 'No space left'; rm /scratch/fill; echo x > /scratch/x && cat /scratch/x",
    )?;
    ensure!(seen.contains("b\n8388608\n1\nNo space left\nx"), "{seen}");
    // Without its patch, ext4 spares the inodes of files that were deleted in an earlier second.
    let seen = shim.script(
        "reuse",
        "cd /scratch; for n in 1 2; do touch file; ls -i file | awk '{ print $1 }'; rm file; sleep 1.5; done | sort -u | wc -l",
    )?;
    ensure!(seen.trim() == "1", "{seen}");
    ensure!(fs::read(&device.0)?.starts_with(b"from the container\n"));
    let error = refused(&host, "second", |id| with_device(id, "rwm"))?;
    ensure!(error.contains(&format!("{} is in use on the host", device.0.display())), "{error}");
    shim.remove()?;
    // Only what the rules allow.
    let id = containerd.id("reader");
    let reader = Shim::running(containerd, &id, &with_device(&id, "r"))?;
    let seen = reader.script("read", "head -c 18 /dev/xvda; echo y | dd of=/dev/xvda 2>&1; ls /scratch")?;
    ensure!(seen.contains("from the container") && seen.contains("not permitted") && !seen.contains("\nx\n"), "{seen}");
    reader.remove()?;
    let left: Vec<_> = fs::read_dir(host.folder.path())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    ensure!(left == ["device.img"], "{left:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_has_30_disks_and_50_rounds_of_disks_leave_nothing() -> Result<()> {
    let host = Host::start("")?;
    let containerd = host.containerd();
    let pod = containerd.id("many");
    let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &[]))?;
    let volumes: Vec<Value> =
        (0..30).map(|number| host.volume(&format!("{number}.img"), &format!("/v/{number}"), 16)).collect();
    let id = containerd.id("thirty");
    let many = Shim::running(containerd, &id, &spec(&pod, &id, &volumes))?;
    let seen = many
        .script("write", "for d in /v/*; do echo $d > $d/name || echo failed; done; cat /v/*/name | sort -u | wc -l")?;
    ensure!(seen.contains("30") && !seen.contains("failed"), "{seen}");
    ensure!(images_of(&host, &pod)? == 30 && disks_in_guest(&host, &pod)? == 30);
    many.remove()?;
    ensure!(images_of(&host, &pod)? == 0 && disks_in_guest(&host, &pod)? == 0);
    // 50 disks in ten containers.
    for round in 0..10 {
        let id = containerd.id("round");
        let volumes = &volumes[round * 2..][..5];
        let shim = Shim::running(containerd, &id, &spec(&pod, &id, volumes))?;
        let seen = shim.script("read", "cat /v/*/name | wc -l")?;
        ensure!(seen.contains(&volumes.len().to_string()), "{seen}");
        shim.remove()?;
    }
    ensure!(images_of(&host, &pod)? == 0 && disks_in_guest(&host, &pod)? == 0);
    let fds = run_in_vm(containerd, &pod, &["ls", "/run/husk/disks"], None)?.ok()?.text();
    ensure!(fds.trim().is_empty(), "{fds}");
    for number in 0..30 {
        fsck(&host.file(&format!("{number}.img")))?;
    }
    pause.remove()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_on_q35_has_disks_too() -> Result<()> {
    let host = Host::start("machine = \"q35\"\n")?;
    let containerd = host.containerd();
    let id = containerd.id("q35");
    let shim = Shim::running(containerd, &id, &spec(&id, &id, &[]))?;
    let app_id = containerd.id("app");
    let app = Shim::running(containerd, &app_id, &spec(&id, &app_id, &[host.volume("a.img", "/data", 16)]))?;
    ensure!(app.script("write", "echo one > /data/file && cat /data/file")?.contains("one"));
    app.remove()?;
    fsck(&host.file("a.img"))?;
    shim.remove()
}

/// Describes a direct-assigned volume, as a CSI driver does, in `folder`.
fn describe(folder: &Path, mounted_at: &Path, info: &Value) -> Result<()> {
    let mut encode = Command::new("sh");
    encode.args(["-c", r#"printf %s "$0" | basenc --base64url --wrap=0"#]).arg(mounted_at);
    let name = String::from_utf8(encode.output()?.stdout)?;
    fs::create_dir_all(folder.join(&name))?;
    Ok(fs::write(folder.join(name).join("mountInfo.json"), info.to_string())?)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_direct_assigned_volume_is_mounted_by_the_host_or_by_one_guest() -> Result<()> {
    let descriptions = tempfile::tempdir()?;
    let host = Host::start(&format!("direct_volume_dir = {:?}\n", descriptions.path()))?;
    let containerd = host.containerd();
    let image = host.file("pvc.img");
    fs::File::create(&image)?.set_len(16 << 20)?;
    said("mkfs.ext4", &[Path::new("-q"), &image])?;
    let device = Loop::of(&image)?;
    // The kubelet's folder, in which the driver has mounted nothing.
    let folder = host.file("mount");
    fs::create_dir(&folder)?;
    let info = json!({"volume-type": "block", "device": device.0, "fstype": "ext4", "options": ["noatime"]});
    let with_volume = |pod: &str, id: &str| {
        let mut spec = spec(pod, id, &[]);
        let bind = json!({"destination": "/data", "type": "bind", "source": folder, "options": ["rbind", "rprivate"]});
        bundle::append(&mut spec, "/mounts", [bind]);
        spec
    };
    for (field, value, expected) in [
        ("metadata", json!({"fsGroup": "7"}), "metadata fsGroup = \"7\": is not supported".to_owned()),
        ("device", json!(image), format!("the direct-assigned volume {} is no block device", image.display())),
    ] {
        let mut wrong = info.clone();
        wrong[field] = value;
        describe(descriptions.path(), &folder, &wrong)?;
        let error = refused(&host, "wrong", |id| with_volume(id, id))?;
        ensure!(error.contains(&expected), "{error}");
    }
    describe(descriptions.path(), &folder, &info)?;

    // Two containers of a pod share it.
    let (pod, id, side_id) = (containerd.id("direct"), containerd.id("app"), containerd.id("side"));
    let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &[]))?;
    let app = Shim::running(containerd, &id, &with_volume(&pod, &id))?;
    let side = Shim::running(containerd, &side_id, &with_volume(&pod, &side_id))?;
    let seen = app.script("write", "echo one > /data/file; sync; grep -c ' /data ext4 rw,noatime' /proc/mounts")?;
    ensure!(seen == "1" && side.script("read", "cat /data/file")? == "one", "{seen}");
    ensure!(fs::read_dir(&folder)?.next().is_none(), "the host sees the volume's files");
    let busy = said("mount", &[&device.0, &folder])?;
    ensure!(busy.contains("busy") || busy.contains("already mounted"), "{busy}");
    let error = refused(&host, "second", |id| with_volume(id, id))?;
    ensure!(error.contains(&format!("{} is in use on the host", device.0.display())), "{error}");
    side.remove()?;
    app.remove()?;

    // The host's turn.
    let mounted = said("mount", &[&device.0, &folder])?;
    let error = refused(&host, "mounted", |id| with_volume(id, id));
    let kept = fs::read_to_string(folder.join("file"));
    let unmounted = said("umount", &[&folder])?;
    ensure!(mounted.is_empty() && unmounted.is_empty() && kept? == "one\n", "{mounted}{unmounted}");
    let error = error?;
    ensure!(error.contains(&format!("{} is in use on the host", device.0.display())), "{error}");
    pause.remove()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_volume_belongs_to_root_of_the_container_whatever_its_user_namespace() -> Result<()> {
    let host = Host::start("")?;
    let containerd = host.containerd();
    let pod = containerd.id("mapped");
    let pause = Shim::running(containerd, &pod, &spec(&pod, &pod, &[]))?;
    // Root of the container cannot create mount points in the root filesystem of these tests.
    let volume = host.volume("a.img", "/tmp", 16);
    let mut containers = Vec::new();
    for (name, first) in [("mapped", Some(100_000)), ("other", Some(300_000)), ("plain", None)] {
        let id = containerd.id(name);
        let mut spec = spec(&pod, &id, std::slice::from_ref(&volume));
        if let Some(first) = first {
            bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "user"})]);
            for field in ["uidMappings", "gidMappings"] {
                spec["linux"][field] = json!([{"containerID": 0, "hostID": first, "size": 65_536}]);
            }
        }
        let shim = Shim::running(containerd, &id, &spec)?;
        let script = format!("cd /tmp && touch {name} && chown 5:6 {name} && stat -c '%u %g' . *");
        let seen = shim.script("own", &script)?;
        // Those of the folder, of lost+found, and of the files that the containers have made so far.
        let expected = [vec!["0 0"; 2], vec!["5 6"; containers.len() + 1]].concat();
        ensure!(seen.lines().eq(expected), "{name}: {seen}");
        containers.push(shim);
    }
    for shim in containers {
        shim.remove()?;
    }
    fsck(&host.file("a.img"))?;
    pause.remove()
}
