//! The flags of `ctr run`, and settings of a spec without a flag: each has its usual effect, or is rejected with an
//! error that names it.
//!
//! `mounts.rs` tests bind mounts, `logging.rs` tests `--log-uri`, `terminal.rs` tests `--tty`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::{self, wait_for};
use husk_tests::compare::{same, tested};
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams};
use husk_tests::{bundle, process};
use serde_json::{Value, json};

/// A containerd whose `ctr` has all flags; those of 1.6 and 1.7 lack some.
fn newest() -> Result<&'static Containerd> {
    Containerd::shared_of(Version::V2_1)
}

/// Runs a script in a container with these flags and returns its stdout and stderr.
fn run_with(flags: &[&str], script: &str) -> Result<String> {
    let containerd = newest()?;
    let ran = containerd.run(flags, &containerd.id("flags"), &["sh", "-c", &format!("exec 2>&1; {script}")]);
    Ok(ran.ok()?.text())
}

/// Runs a container with these flags, which must fail, and returns ctr's error output.
fn run_error(flags: &[&str]) -> Result<String> {
    let containerd = newest()?;
    let ran = containerd.run(flags, &containerd.id("refused"), &["true"]).output()?;
    ensure!(ran.code() != 0, "the container was created: {ran}");
    Ok(ran.errors())
}

/// Starts a shim for a container with a modified spec.
fn shim(name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<Shim<'static>> {
    let containerd = newest()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sh", "-c", &format!("exec 2>&1; {script}")]);
    change(&mut spec);
    Shim::start(containerd, &id, &spec)
}

/// Calls Create with a modified spec, which must fail, and returns the error message.
fn create_error(name: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    shim(name, "true", change)?.create_error()
}

/// The value of a field of /proc/self/status.
fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name} in: {status}"))?.trim())
}

fn capabilities(status: &str) -> Result<u64> {
    Ok(u64::from_str_radix(field(status, "CapEff")?, 16)?)
}

#[test]
fn environment_working_directory_and_host_name_take_effect() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("env");
    fs::write(&file, "FROM_FILE=a b=c\nTWICE=file\n")?;
    let file = file.display().to_string();
    let flags = ["--env", "COLOUR=red green", "--env", "TWICE=flag", "--env-file", &file];
    let more = ["--cwd", "/not/there/before", "--hostname", "named"];
    let script = r#"echo "$COLOUR|$FROM_FILE|$TWICE"; pwd; hostname; cat /proc/sys/kernel/hostname"#;
    let output = run_with(&[&flags[..], &more].concat(), script)?;
    let lines: Vec<&str> = output.lines().collect();
    ensure!(lines[0].starts_with("red green|a b=c|") && lines[0].len() > "red green|a b=c|".len(), "{output}");
    ensure!(lines[1..] == ["/not/there/before", "named", "named"], "{output}");
    Ok(())
}

#[test]
fn the_user_can_be_a_uid_a_uid_and_gid_or_a_name() -> Result<()> {
    let groups = |id: &str| id.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    for (user, expected) in [("1234", "1234 0 0"), ("1234:50", "1234 50 50"), ("app", "1000 1000 1000 50")] {
        let output = groups(&run_with(
            &["--user", user],
            "id -u; id -g; id -G; touch /root/x; unshare -U true && echo unshared",
        )?);
        let ids = output.split(" touch:").next().unwrap_or_default();
        ensure!(ids == expected && output.ends_with("Permission denied unshared"), "--user {user}: {output}");
    }
    let message = run_error(&["--user", "nosuch"])?;
    ensure!(message.contains("user"), "{message}");
    Ok(())
}

#[test]
fn privileged_grants_all_capabilities_and_masks_no_path() -> Result<()> {
    let script = "cat /proc/self/status; mount -t tmpfs t /tmp && echo mounted; \
        value=$(cat /proc/sys/kernel/panic) && echo $value > /proc/sys/kernel/panic && echo sysctl; \
        mknod /tmp/kmsg c 1 11 && head -c 0 /tmp/kmsg && echo device; grep -c ' /proc/.* ro' /proc/mounts; [ -c /dev/null ] && echo null";
    let output = run_with(&["--privileged"], script)?;
    // ctr requests all capabilities that it has itself.
    let expected = capabilities(&fs::read_to_string("/proc/self/status")?)?;
    ensure!(capabilities(&output)? == expected, "expected {expected:x}: {output}");
    ensure!(output.ends_with("mounted\nsysctl\ndevice\n0\nnull"), "{output}");
    Ok(())
}

#[test]
fn capabilities_can_be_added_and_dropped_and_the_default_seccomp_profile_applies() -> Result<()> {
    // SYS_ADMIN is 21, CHOWN 0, KILL 5 (linux/capability.h).
    let script = "cat /proc/self/status; chown 1:1 /tmp; mount -t tmpfs t /tmp && echo mounted; unshare -U true && echo unshared; \
        touch /new; touch /run/x && echo fine";
    let added = run_with(&["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"], script)?;
    ensure!(capabilities(&added)? & (1 << 21 | 1 | 1 << 5) == (1 << 21 | 1 << 5), "{added}");
    ensure!(added.contains("chown:") && added.contains("mounted") && added.contains("unshared"), "{added}");
    ensure!(field(&added, "NoNewPrivs")? == "1", "{added}");

    // Every user may create a user namespace (see the test of users), but the profile requires SYS_ADMIN for it.
    let flags = ["--seccomp", "--read-only", "--allow-new-privs"];
    let filtered = run_with(&flags, script)?;
    ensure!(field(&filtered, "Seccomp")? == "2" && field(&filtered, "NoNewPrivs")? == "0", "{filtered}");
    ensure!(capabilities(&filtered)? & (1 << 21 | 1) == 1 && !filtered.contains("mounted"), "{filtered}");
    ensure!(filtered.contains("unshare:") && !filtered.contains("unshared"), "{filtered}");
    ensure!(filtered.contains("touch: /new: Read-only file system") && filtered.ends_with("fine"), "{filtered}");
    Ok(())
}

#[test]
fn limits_and_the_cgroup_path_take_effect() -> Result<()> {
    let containerd = newest()?;
    let cgroup = format!("/{}/inner", containerd.id("cgroup"));
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let flags = ["--cpus", "0.25", "--memory-limit", "67108864", "--cpu-shares", "512", "--cpuset-cpus", "0"];
    let flags = [&flags[..], &["--cgroup", &cgroup, "--mount", mount]].concat();
    let container = containerd.detached(&flags, "limited", &["sleep", "1000"])?;
    let (files, expected) = match containerd.runtime() {
        Runtime::Husk => ("cpu.max memory.max cpuset.cpus.effective cpu.weight", "25000 100000\n67108864\n0\n59"),
        Runtime::Runc => ("cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes cpuset/cpuset.cpus", "25000\n67108864\n0"),
    };
    let output = container.script(&format!("cd /sys/fs/cgroup; cat {files}"))?;
    ensure!(output == expected, "{output}");
    // The host processes that serve the container are in that cgroup.
    let cgroup_of = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let inside: Vec<_> = process::descendants(containerd.pid())
        .into_iter()
        .filter(|process| cgroup_of(process.pid).contains(&format!("{cgroup}\n")))
        .collect();
    ensure!(!inside.is_empty(), "no process is in {cgroup}");
    Ok(())
}

#[test]
fn a_plain_directory_can_be_the_root() -> Result<()> {
    let containerd = newest()?;
    let image = containerd.unpacked_image()?;
    let root = format!("/run/{}", containerd.id("root"));
    containerd.sh(&format!("cp -a {image} {root} && echo plain > {root}/which"))?;
    let script = "cat /which; echo answer > /written";
    let run = |flags: &[&str]| {
        let ctr = containerd
            .ctr(["run", "--rm", "--runtime", containerd.runtime().name(), "--rootfs"])
            .args(["--env", "PATH=/bin"])
            .args(flags);
        ctr.args([&root, &containerd.id("plain")]).args(["sh", "-c", script]).output()
    };
    let first = run(&[])?.ok()?;
    ensure!(first.text() == "plain", "{first}");
    let written = containerd.path(&root).join("written");
    ensure!(fs::read_to_string(&written)? == "answer\n", "the file was not written to the directory");
    fs::remove_file(&written)?;
    let second = run(&["--read-only"])?;
    ensure!(second.text() == "plain" && second.errors().contains("Read-only file system"), "{second}");
    ensure!(!written.exists());
    Ok(())
}

#[test]
fn mounts_of_all_types_without_a_host_resource_work() -> Result<()> {
    let types = ["tmpfs", "ramfs", "proc", "sysfs", "mqueue", "devpts"];
    let mounts: Vec<String> = types.iter().map(|kind| format!("type={kind},src={kind},dst=/m/{kind}")).collect();
    let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let output =
        run_with(&flags, "grep ' /m/' /proc/mounts | cut -d ' ' -f 2,3; echo x > /m/tmpfs/x && cat /m/tmpfs/x")?;
    let expected: Vec<String> = types.iter().map(|kind| format!("/m/{kind} {kind}")).chain(["x".into()]).collect();
    ensure!(output.lines().eq(expected.iter()), "{output}");

    let message = run_error(&["--mount", "type=nfs,src=server:/export,dst=/data,options=ro"])?;
    if newest()?.runtime().is_husk_or_report_skip() {
        ensure!(message.contains(".type \"nfs\": in a VM, a mount must be a bind mount or one of "), "{message}");
    }
    Ok(())
}

#[test]
fn mounts_propagate_as_rootfs_propagation_says() -> Result<()> {
    for (propagation, shared) in [("rshared", true), ("rslave", false)] {
        let output = run_with(&["--rootfs-propagation", propagation], "grep ' / / ' /proc/self/mountinfo")?;
        // runc 1.1 accepts "rshared" and leaves the root private.
        let shared = shared && newest()?.runtime() == Runtime::Husk;
        ensure!(output.contains(" shared:") == shared, "{propagation}: {output}");
    }
    Ok(())
}

#[test]
fn the_pid_file_contains_the_tasks_pid_and_null_io_discards_all_streams() -> Result<()> {
    let containerd = newest()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("pid");
    let script = "echo lost; echo lost >&2; cat > /input; echo $? > /done; sleep 1000";
    let flags = ["--null-io", "--pid-file", &file.display().to_string()];
    let container = containerd.detached(&flags, "null-io", &["sh", "-c", script])?;
    let done = wait_for(Duration::from_secs(60), "stdin ends", || container.script("cat /done /input").ok())?;
    ensure!(done == "0", "{done}");
    ensure!(container.script("for fd in 0 1 2; do readlink /proc/1/fd/$fd; done")? == ["/dev/null"; 3].join("\n"));
    let list = containerd.ctr(["task", "ls"]).ok()?.text();
    let line = list.lines().find(|line| line.starts_with(container.id())).context("no such task")?;
    ensure!(line.split_whitespace().nth(1) == Some(fs::read_to_string(&file)?.trim()), "{line}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn host_devices_are_rejected_with_path_and_numbers() -> Result<()> {
    let containerd = newest()?;
    let tape = format!("/run/{}", containerd.id("tape"));
    containerd.sh(&format!("mknod {tape} c 9 77"))?;
    let message = run_error(&["--device", &tape, "--device", "/dev/kmsg"])?;
    let why = format!("linux.devices: devices of the host cannot be used in a VM: {tape} (c 9:77)");
    ensure!(message.contains(&why) && !message.contains("kmsg"), "guests have /dev/kmsg: {message}");
    // A block device becomes a disk, if it exists.
    let disk = format!("/run/{}", containerd.id("disk"));
    containerd.sh(&format!("mknod {disk} b 7 77"))?;
    let message = run_error(&["--device", &disk])?;
    ensure!(message.contains("linux.devices: find the block device 7:77 of the host"), "{message}");
    let zero = format!("/run/{}", containerd.id("zero"));
    containerd.sh(&format!("mknod {zero} c 1 5"))?;
    let message = run_error(&["--device", &zero])?;
    ensure!(message.contains(&format!("linux.devices: {zero} is not below /dev")), "{message}");
    // Without the flag, the device neither exists nor is allowed.
    let output = run_with(&["--device", "/dev/kmsg"], "stat -c '%F %t:%T' /dev/kmsg; true >/dev/kmsg && echo opened")?;
    ensure!(output == "character special file 1:b\nopened", "{output}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn devices_of_the_guest_work_alone_and_in_a_privileged_container() -> Result<()> {
    let device = |path: &str, kind: &str, major: i64, minor: i64| json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o600});
    let rule =
        |major: i64, minor: i64| json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"});
    let added = [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200), ("/dev/kmsg", 1, 11)];
    // As `ctr run --privileged --device ...` writes it: all devices of the host, then again those that the user names.
    let host = [device("/dev/null", "c", 1, 3), device("/dev/fuse", "c", 10, 229), device("/dev/sda", "b", 8, 0)];
    let script = "cd /dev; stat -c '%n %F %t:%T %a' fuse net/tun kmsg null";
    for privileged in [false, true] {
        let observe = |containerd: &'static Containerd, script: &str| {
            let id = containerd.id("devices");
            let mut spec = bundle::spec(&id, &["sh", "-c", &format!("exec 2>&1; {script}")]);
            spec["linux"]["devices"] = json!([]);
            if privileged {
                spec["linux"]["resources"]["devices"] =
                    json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
                bundle::append(&mut spec, "/linux/devices", host.iter().cloned());
            }
            bundle::append(
                &mut spec,
                "/linux/devices",
                added.map(|(path, major, minor)| device(path, "c", major, minor)),
            );
            bundle::append(&mut spec, "/linux/resources/devices", added.map(|(_, major, minor)| rule(major, minor)));
            let (status, out, err) = Shim::start(containerd, &id, &spec)?.run()?;
            ensure!(status == 0, "privileged {privileged}: {status}: {out}\n{err}");
            Ok(out)
        };
        let found = same(|containerd| observe(containerd, script))?;
        ensure!(found.starts_with("fuse character special file a:e5 600\nnet/tun character"), "{found}");
        let opened = observe(tested()?, "for d in fuse net/tun kmsg; do true >/dev/$d && echo opened; done")?;
        ensure!(opened.matches("opened").count() == 3, "privileged {privileged}: {opened}");
    }
    // A hundred devices of the host make one line, which names some of them.
    let message = create_error("many-devices", |spec| {
        spec["linux"]["devices"] = (0..100).map(|n| device(&format!("/dev/sg{n}"), "c", 21, n)).collect();
    })?;
    let line = "linux.devices: devices of the host cannot be used in a VM: /dev/sg0 (c 21:0), ";
    ensure!(message.contains(line) && message.contains(" and 95 more") && message.len() < 400, "{message}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn gpus_are_rejected_because_a_host_hook_cannot_act_inside_a_vm() -> Result<()> {
    let containerd = newest()?;
    // ctr looks for both programs before it adds them to the spec as a hook.
    let folder = tempfile::tempdir()?;
    std::os::unix::fs::symlink("/bin/true", folder.path().join("nvidia-container-cli"))?;
    let mut ctr = containerd.run(&["--gpus", "0"], &containerd.id("gpus"), &["true"]).command();
    ctr.env("PATH", format!("{}:{}", folder.path().display(), containerd.search_path()));
    let ran = command::run(ctr, None, Duration::from_secs(60))?;
    let program = containerd.bin().join("containerd").display().to_string();
    let why = format!("[0].path \"{program}\": a program of the host cannot act on a container in a VM");
    ensure!(ran.code() != 0 && ran.errors().contains("hooks.") && ran.errors().contains(&why), "{ran}");
    Ok(())
}

#[test]
fn sysctls_host_names_and_annotations_take_effect_before_the_process_starts() -> Result<()> {
    let script = "cd /proc/sys; cat kernel/hostname kernel/domainname kernel/shmmax net/ipv4/ip_unprivileged_port_start; cat /state";
    let run = shim("start-hook", script, |spec| {
        spec["hostname"] = json!("inside");
        spec["domainname"] = json!("example.org");
        spec["linux"]["sysctl"] = json!({"kernel.shmmax": "12345678", "net.ipv4.ip_unprivileged_port_start": "80"});
        spec["annotations"] = json!({"org.example.colour": "green"});
        let hook = |path: &str, script: &str| json!({"path": path, "args": ["sh", "-c", script], "env": ["HOOK=1", "PATH=/bin"]});
        spec["hooks"] =
            json!({"startContainer": [hook("/bin/sh", "cat > /state"), hook("/bin/sh", "echo; echo $HOOK >> /state")]});
    })?;
    // runc supports domain names since 1.2.
    let domain = if run.containerd().runtime() == Runtime::Husk { "example.org" } else { "(none)" };
    let id = run.bundle.id.clone();
    let (status, out, _) = run.run()?;
    let lines: Vec<&str> = out.lines().collect();
    ensure!(status == 0 && lines.len() > 4 && lines[..4] == ["inside", domain, "12345678", "80"], "{out}");
    let hooked = lines[4].strip_suffix('1').with_context(|| format!("the second hook did not run: {out}"))?;
    let state: Value = serde_json::from_str(hooked).with_context(|| hooked.to_owned())?;
    ensure!(state["id"] == json!(id) && state["annotations"]["org.example.colour"] == json!("green"), "{state}");
    // The state as seen in the container, because startContainer hooks run inside.
    ensure!(state["bundle"].is_string() && state["status"] == json!("created") && state["pid"] == json!(1), "{state}");

    let message = create_error("sysctl", |spec| spec["linux"]["sysctl"] = json!({"kernel.shm_nonsense": "1"}))?;
    ensure!(message.contains("nonsense"), "{message}");
    Ok(())
}

#[test]
fn a_failing_start_container_hook_is_named_by_start_and_the_process_does_not_run() -> Result<()> {
    let failed = shim("bad-hook", "touch /ran", |spec| {
        let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        spec["hooks"] = json!({"startContainer": [hook("exit 0"), hook("exit 3")]});
    })?;
    let id = &failed.bundle.id;
    failed.create(&Streams::default())?;
    let started = failed.task.start(id, "");
    // runc's Start returns before its hooks run.
    if failed.containerd().runtime() == Runtime::Husk {
        let error = started.err().context("Start succeeded")?.to_string();
        ensure!(error.contains("hooks.startContainer[1] /bin/sh") && error.contains("exit code: 3"), "{error}");
    }
    ensure!(failed.task.wait(id, "")? != 0 && !failed.bundle.outside.join("upper/ran").exists());
    failed.task.delete(id, "")?;
    Ok(())
}

/// Puts the container into a user namespace.
fn in_user_namespace(spec: &mut Value, users: u32, groups: u32) {
    bundle::append(spec, "/linux/namespaces", [json!({"type": "user"})]);
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": users, "size": 65_536}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": groups, "size": 65_536}]);
}

#[test]
fn files_of_an_id_mapped_mount_have_their_own_owners_in_the_container() -> Result<()> {
    // On a disk: /tmp may be an overlay, which cannot be ID-mapped.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let (owned, file) = (folder.path().join("owned"), folder.path().join("file"));
    for (path, owner) in [(&owned, (5, 6)), (&file, (0, 0))] {
        fs::write(path, "")?;
        chown(path, Some(owner.0), Some(owner.1))?;
    }
    // Root of the container cannot create mount points in this root filesystem.
    let script = "stat -c '%u %g' /tmp /tmp/owned /etc/passwd /etc/group; echo x > /tmp/new; stat -c '%u %g' /tmp/new";
    let run = shim("idmap", script, |spec| {
        in_user_namespace(spec, 100_000, 200_000);
        let [uids, gids] = ["uidMappings", "gidMappings"].map(|field| spec["linux"][field].clone());
        let mount = |source: &Path, destination: &str| json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind"]});
        let mut mapped = [mount(folder.path(), "/tmp"), mount(&file, "/etc/passwd")];
        for mount in &mut mapped {
            (mount["uidMappings"], mount["gidMappings"]) = (uids.clone(), gids.clone());
        }
        bundle::append(spec, "/mounts", mapped.into_iter().chain([mount(&file, "/etc/group")]));
    })?;
    let (status, out, err) = run.run()?;
    // What is not mapped belongs to nobody.
    ensure!(status == 0 && out == "0 0\n5 6\n0 0\n65534 65534\n0 0", "{status}: {out}\n{err}");
    let new = folder.path().join("new").metadata()?;
    ensure!((new.uid(), new.gid()) == (0, 0), "{new:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn mounts_that_cannot_be_id_mapped_are_rejected_by_name() -> Result<()> {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let bind = |more: Value| {
        let mut mount = json!({"destination": "/data", "type": "bind", "source": "/var/tmp", "options": ["rbind"]});
        for (field, value) in more.as_object().into_iter().flatten() {
            mount[field] = value.clone();
        }
        mount
    };
    let both = json!({"uidMappings": mapping, "gidMappings": mapping});
    let table = [
        (bind(json!({"uidMappings": mapping})), "mounts[8].gidMappings: is missing beside uidMappings"),
        (bind(json!({"gidMappings": mapping})), "mounts[8].uidMappings: is missing beside gidMappings"),
        (
            bind(json!({"options": ["bind", "idmap"]})),
            "mounts[8].options \"idmap\": the container has no user namespace",
        ),
        (
            bind(json!({"type": "tmpfs", "options": [], "uidMappings": mapping, "gidMappings": mapping})),
            "mounts[8].uidMappings: only bind mounts can be ID-mapped",
        ),
        (
            bind(json!({"source": "/dev/null", "uidMappings": mapping, "gidMappings": mapping})),
            "mounts[8].source \"/dev/null\": only folders and files can be ID-mapped",
        ),
    ];
    for (mount, expected) in table {
        let message = create_error("idmap", |spec| bundle::append(spec, "/mounts", [mount]))?;
        ensure!(message.contains(expected), "{message}");
    }
    // The host's kernel decides: proc(5) cannot be mapped.
    let message = create_error("idmap", |spec| {
        let mut mount = bind(both);
        mount["source"] = "/proc/sys".into();
        bundle::append(spec, "/mounts", [mount]);
    })?;
    let expected = "map the IDs of the mount: Invalid argument (os error 22): the host's kernel does not support it";
    ensure!(message.contains("mounts[8].source \"/proc/sys\"") && message.contains(expected), "{message}");
    Ok(())
}

/// Prints who root is in a user namespace: to the kernel, to the image's files and to its own files.
const OWNERS: &str = "cat /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u /etc; cd /tmp && touch new && \
    chown 5:6 new && stat -c '%u %g' new";

#[test]
fn root_in_a_user_namespace_is_mapped_for_files() -> Result<()> {
    let script = format!("{OWNERS}; cd /sys/fs/cgroup; cat pids.max 2>/dev/null || cat pids/pids.max");
    let run = shim("userns", &script, |spec| {
        in_user_namespace(spec, 100_000, 200_000);
        spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    })?;
    let (status, out, _) = run.run()?;
    let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
    // The image's files belong to nobody there.
    ensure!(status == 0 && words == "0 100000 65536 0 200000 65536 0 65534 5 6 50", "{status}: {out}");
    let new = run.bundle.outside.join("upper/tmp/new").metadata().context("the new file is not on the host")?;
    ensure!((new.uid(), new.gid()) == (100_005, 200_006), "{new:?}");
    Ok(())
}

#[test]
fn ctr_maps_users_and_the_rootfs() -> Result<()> {
    let output = run_with(&["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"], OWNERS)?;
    let words = output.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words == "0 100000 65536 0 100000 65536 0 0 5 6", "{output}");
    Ok(())
}

#[test]
fn layers_of_an_image_are_mapped_where_containers_share_them() -> Result<()> {
    // The snapshotter copies no layer, and asks for ID-mapped ones.
    let mapped = ["--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let script = format!("{OWNERS}; stat -c '%u %g' /bin/busybox /home/app; echo x > /etc/passwd && cat /etc/passwd");
    let output = run_with(&mapped, &script)?;
    let words = output.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words == "0 100000 65536 0 100000 65536 0 0 5 6 0 0 1000 1000 x", "{output}");
    Ok(())
}
