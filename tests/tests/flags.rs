//! The flags of `ctr run`, and what of a spec they cannot say: each does in the container what its user expects, or is refused by name.
//!
//! Bind mounts are in `mounts.rs`, `--log-uri` is in `logging.rs`, `--tty` in `terminal.rs`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams};
use husk_tests::{bundle, process};
use serde_json::{Value, json};

/// A containerd whose `ctr` has all flags: those of 1.6 and 1.7 lack some.
fn newest() -> Result<&'static Containerd> {
    Containerd::shared_of(Version::V2_1)
}

/// What a container with these flags prints, with its errors.
fn ran(flags: &[&str], script: &str) -> Result<String> {
    let containerd = newest()?;
    let ran = containerd.run(flags, &containerd.id("flags"), &["sh", "-c", &format!("exec 2>&1; {script}")]);
    Ok(ran.ok()?.text())
}

/// How `ctr run` with these flags is refused.
fn refused(flags: &[&str]) -> Result<String> {
    let containerd = newest()?;
    let ran = containerd.run(flags, &containerd.id("refused"), &["true"]).output()?;
    ensure!(ran.code() != 0, "it was not refused: {ran}");
    Ok(ran.errors())
}

/// A serving shim for a container with a spec that no flag makes.
fn shim(name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<Shim<'static>> {
    let containerd = newest()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sh", "-c", &format!("exec 2>&1; {script}")]);
    change(&mut spec);
    Shim::start(containerd, &id, &spec)
}

/// How a spec that no flag makes is refused by Create.
fn refused_spec(name: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    shim(name, "true", change)?.refused()
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
fn environment_working_folder_and_host_name_are_those_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("env");
    fs::write(&file, "FROM_FILE=a b=c\nTWICE=file\n")?;
    let file = file.display().to_string();
    let flags = ["--env", "COLOUR=red green", "--env", "TWICE=flag", "--env-file", &file];
    let more = ["--cwd", "/not/there/before", "--hostname", "named"];
    let script = r#"echo "$COLOUR|$FROM_FILE|$TWICE"; pwd; hostname; cat /proc/sys/kernel/hostname"#;
    let seen = ran(&[&flags[..], &more].concat(), script)?;
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines[0].starts_with("red green|a b=c|") && lines[0].len() > "red green|a b=c|".len(), "{seen}");
    ensure!(lines[1..] == ["/not/there/before", "named", "named"], "{seen}");
    Ok(())
}

#[test]
fn a_user_is_a_number_two_numbers_or_a_name_with_its_groups() -> Result<()> {
    let groups = |id: &str| id.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    for (user, wanted) in [("1234", "1234 0 0"), ("1234:50", "1234 50 50"), ("app", "1000 1000 1000 50")] {
        let seen =
            groups(&ran(&["--user", user], "id -u; id -g; id -G; touch /root/x; unshare -U true && echo unshared")?);
        let seen_ids = seen.split(" touch:").next().unwrap_or_default();
        ensure!(seen_ids == wanted && seen.ends_with("Permission denied unshared"), "--user {user}: {seen}");
    }
    let message = refused(&["--user", "nosuch"])?;
    ensure!(message.contains("user"), "{message}");
    Ok(())
}

#[test]
fn privileged_means_every_capability_and_no_path_masked_or_read_only() -> Result<()> {
    let script = "cat /proc/self/status; mount -t tmpfs t /tmp && echo mounted; \
        value=$(cat /proc/sys/kernel/panic) && echo $value > /proc/sys/kernel/panic && echo sysctl; \
        mknod /tmp/kmsg c 1 11 && head -c 0 /tmp/kmsg && echo device; grep -c ' /proc/.* ro' /proc/mounts; [ -c /dev/null ] && echo null";
    let seen = ran(&["--privileged"], script)?;
    // ctr asks for all that it has itself.
    let wanted = capabilities(&fs::read_to_string("/proc/self/status")?)?;
    ensure!(capabilities(&seen)? == wanted, "wanted {wanted:x}: {seen}");
    ensure!(seen.ends_with("mounted\nsysctl\ndevice\n0\nnull"), "{seen}");
    Ok(())
}

#[test]
fn capabilities_are_added_and_dropped_by_name_and_the_default_seccomp_profile_holds() -> Result<()> {
    // SYS_ADMIN is 21, CHOWN 0, KILL 5 (linux/capability.h).
    let script = "cat /proc/self/status; chown 1:1 /tmp; mount -t tmpfs t /tmp && echo mounted; unshare -U true && echo unshared; \
        touch /new; touch /run/x && echo fine";
    let added = ran(&["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"], script)?;
    ensure!(capabilities(&added)? & (1 << 21 | 1 | 1 << 5) == (1 << 21 | 1 << 5), "{added}");
    ensure!(added.contains("chown:") && added.contains("mounted") && added.contains("unshared"), "{added}");
    ensure!(field(&added, "NoNewPrivs")? == "1", "{added}");

    // Anybody may make a user namespace (see the test of users), but under the profile only those with SYS_ADMIN.
    let flags = ["--seccomp", "--read-only", "--allow-new-privs"];
    let filtered = ran(&flags, script)?;
    ensure!(field(&filtered, "Seccomp")? == "2" && field(&filtered, "NoNewPrivs")? == "0", "{filtered}");
    ensure!(capabilities(&filtered)? & (1 << 21 | 1) == 1 && !filtered.contains("mounted"), "{filtered}");
    ensure!(filtered.contains("unshare:") && !filtered.contains("unshared"), "{filtered}");
    ensure!(filtered.contains("touch: /new: Read-only file system") && filtered.ends_with("fine"), "{filtered}");
    Ok(())
}

#[test]
fn limits_hold_and_the_cgroup_is_the_one_that_was_asked_for() -> Result<()> {
    let containerd = newest()?;
    let cgroup = format!("/{}/inner", containerd.id("cgroup"));
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let flags = ["--cpus", "0.25", "--memory-limit", "67108864", "--cpu-shares", "512", "--cpuset-cpus", "0"];
    let flags = [&flags[..], &["--cgroup", &cgroup, "--mount", mount]].concat();
    let container = containerd.detached(&flags, "limited", &["sleep", "1000"])?;
    let (files, wanted) = match containerd.runtime() {
        Runtime::Husk => ("cpu.max memory.max cpuset.cpus cpu.weight", "25000 100000\n67108864\n0\n59"),
        Runtime::Runc => ("cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes cpuset/cpuset.cpus", "25000\n67108864\n0"),
    };
    let seen = container.script(&format!("cd /sys/fs/cgroup; cat {files}"))?;
    ensure!(seen == wanted, "{seen}");
    // What does the container's work on the host is in that cgroup.
    let cgroup_of = |pid: i32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let inside: Vec<_> = process::descendants(containerd.pid())
        .into_iter()
        .filter(|process| cgroup_of(process.pid).contains(&format!("{cgroup}\n")))
        .collect();
    ensure!(!inside.is_empty(), "no process is in {cgroup}");
    Ok(())
}

#[test]
fn a_plain_folder_can_be_the_root() -> Result<()> {
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
    ensure!(fs::read_to_string(&written)? == "answer\n", "the folder itself is the root");
    fs::remove_file(&written)?;
    let second = run(&["--read-only"])?;
    ensure!(second.text() == "plain" && second.errors().contains("Read-only file system"), "{second}");
    ensure!(!written.exists());
    Ok(())
}

#[test]
fn a_mount_is_of_any_type_that_needs_nothing_of_the_host() -> Result<()> {
    let types = ["tmpfs", "ramfs", "proc", "sysfs", "mqueue", "devpts"];
    let mounts: Vec<String> = types.iter().map(|kind| format!("type={kind},src={kind},dst=/m/{kind}")).collect();
    let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let seen = ran(&flags, "grep ' /m/' /proc/mounts | cut -d ' ' -f 2,3; echo x > /m/tmpfs/x && cat /m/tmpfs/x")?;
    let wanted: Vec<String> = types.iter().map(|kind| format!("/m/{kind} {kind}")).chain(["x".into()]).collect();
    ensure!(seen.lines().eq(wanted.iter()), "{seen}");

    let message = refused(&["--mount", "type=nfs,src=server:/export,dst=/data,options=ro"])?;
    if newest()?.runtime().is_husk_or_tell("a_mount_is_of_any_type_that_needs_nothing_of_the_host: an unknown one") {
        ensure!(message.contains(".type \"nfs\": in a VM, a mount is a bind or one of "), "{message}");
    }
    Ok(())
}

#[test]
fn mounts_in_a_container_spread_as_its_root_was_told_to() -> Result<()> {
    for (propagation, shared) in [("rshared", true), ("rslave", false)] {
        let seen = ran(&["--rootfs-propagation", propagation], "grep ' / / ' /proc/self/mountinfo")?;
        // runc 1.1 takes "rshared" and leaves the root private.
        let shared = shared && newest()?.runtime() == Runtime::Husk;
        ensure!(seen.contains(" shared:") == shared, "{propagation}: {seen}");
    }
    Ok(())
}

#[test]
fn a_detached_container_has_its_pid_in_the_file_and_no_io_at_all_if_asked() -> Result<()> {
    let containerd = newest()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("pid");
    let script = "echo lost; echo lost >&2; cat > /input; echo $? > /done; sleep 1000";
    let flags = ["--null-io", "--pid-file", &file.display().to_string()];
    let container = containerd.detached(&flags, "null-io", &["sh", "-c", script])?;
    let done = wait_for(Duration::from_secs(20), "stdin has ended", || container.script("cat /done /input").ok())?;
    ensure!(done == "0", "{done}");
    ensure!(container.script("for fd in 0 1 2; do readlink /proc/1/fd/$fd; done")? == ["/dev/null"; 3].join("\n"));
    let list = containerd.ctr(["task", "ls"]).ok()?.text();
    let line = list.lines().find(|line| line.starts_with(container.id())).context("no such task")?;
    ensure!(line.split_whitespace().nth(1) == Some(fs::read_to_string(&file)?.trim()), "{line}");
    Ok(())
}

#[test]
fn a_device_of_the_host_is_refused_with_its_path_and_numbers() -> Result<()> {
    let containerd = newest()?;
    if !containerd.runtime().is_husk_or_tell("a_device_of_the_host_is_refused_with_its_path_and_numbers") {
        return Ok(());
    }
    let disk = format!("/run/{}", containerd.id("disk"));
    containerd.sh(&format!("mknod {disk} b 7 77"))?;
    let message = refused(&["--device", &disk, "--device", "/dev/kmsg"])?;
    let why = format!(".path \"{disk}\": device b 7:77 of the host cannot be used in a VM");
    ensure!(message.contains(&why) && !message.contains("kmsg"), "a guest has that one: {message}");
    let zero = format!("/run/{}", containerd.id("zero"));
    containerd.sh(&format!("mknod {zero} c 1 5"))?;
    let message = refused(&["--device", &zero])?;
    ensure!(message.contains(&format!("linux.devices: {zero} is not below /dev")), "{message}");
    // Without the flag it is neither there nor allowed.
    let seen = ran(
        &["--device", "/dev/kmsg"],
        "stat -c '%F %t:%T' /dev/kmsg; dd if=/dev/kmsg count=0 2>/dev/null && echo opened",
    )?;
    ensure!(seen == "character special file 1:b\nopened", "{seen}");
    Ok(())
}

#[test]
fn gpus_are_refused_because_a_program_of_the_host_cannot_reach_into_a_vm() -> Result<()> {
    let containerd = newest()?;
    let name = "gpus_are_refused_because_a_program_of_the_host_cannot_reach_into_a_vm";
    if !containerd.runtime().is_husk_or_tell(name) {
        return Ok(());
    }
    // ctr looks for both programs before it writes them into the spec as a hook.
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
fn kernel_parameters_names_and_annotations_of_the_spec_are_there_before_the_process() -> Result<()> {
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
    // runc knows domain names from 1.2 on.
    let domain = if run.containerd().runtime() == Runtime::Husk { "example.org" } else { "(none)" };
    let id = run.bundle.id.clone();
    let (status, out, _) = run.run()?;
    let lines: Vec<&str> = out.lines().collect();
    ensure!(status == 0 && lines.len() > 4 && lines[..4] == ["inside", domain, "12345678", "80"], "{out}");
    let hooked = lines[4].strip_suffix('1').with_context(|| format!("the second hook has not run: {out}"))?;
    let state: Value = serde_json::from_str(hooked).with_context(|| hooked.to_owned())?;
    ensure!(state["id"] == json!(id) && state["annotations"]["org.example.colour"] == json!("green"), "{state}");
    // As the container sees it: the hooks run inside.
    ensure!(state["bundle"].is_string() && state["status"] == json!("created") && state["pid"] == json!(1), "{state}");

    let message = refused_spec("sysctl", |spec| spec["linux"]["sysctl"] = json!({"kernel.shm_nonsense": "1"}))?;
    ensure!(message.contains("nonsense"), "{message}");
    Ok(())
}

#[test]
fn a_hook_that_fails_keeps_the_process_from_running_and_is_named_by_start() -> Result<()> {
    let failed = shim("bad-hook", "touch /ran", |spec| {
        let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        spec["hooks"] = json!({"startContainer": [hook("exit 0"), hook("exit 3")]});
    })?;
    let id = &failed.bundle.id;
    failed.create(&Streams::default())?;
    let started = failed.task.start(id, "");
    // runc has answered the start by the time that its hooks run.
    if failed.containerd().runtime() == Runtime::Husk {
        let error = started.err().context("it has started")?.to_string();
        ensure!(error.contains("hooks.startContainer[1] /bin/sh") && error.contains("exit code: 3"), "{error}");
    }
    ensure!(failed.task.wait(id, "")? != 0 && !failed.bundle.outside.join("upper/ran").exists());
    failed.task.delete(id, "")?;
    Ok(())
}

#[test]
fn id_mapped_mounts_are_refused_by_name() -> Result<()> {
    if !newest()?.runtime().is_husk_or_tell("id_mapped_mounts_are_refused_by_name") {
        return Ok(());
    }
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let more = [("uidMappings", mapping.clone()), ("gidMappings", mapping), ("options", json!(["rbind", "idmap"]))];
    for (field, value) in more {
        let message = refused_spec("idmap", |spec| {
            let mut mount = json!({"destination": "/data", "type": "bind", "source": "/tmp", "options": ["rbind"]});
            mount[field] = value;
            spec["mounts"].as_array_mut().expect("the default spec has it").push(mount);
        })?;
        ensure!(message.contains("/data cannot be id-mapped"), "{field}: {message}");
    }
    Ok(())
}

/// What root is in a user namespace: to the kernel, to the image's files, to its own.
const OWNERS: &str = "cat /proc/self/uid_map /proc/self/gid_map; id -u; stat -c %u /etc; cd /tmp && touch new && \
    chown 5:6 new && stat -c '%u %g' new";

#[test]
fn in_a_user_namespace_root_is_somebody_else_to_the_files() -> Result<()> {
    let script = format!("{OWNERS}; cd /sys/fs/cgroup; cat pids.max 2>/dev/null || cat pids/pids.max");
    let run = shim("userns", &script, |spec| {
        spec["linux"]["namespaces"].as_array_mut().expect("the default spec has it").push(json!({"type": "user"}));
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
        spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    })?;
    let (status, out, _) = run.run()?;
    let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
    // The image's own files belong to nobody there.
    ensure!(status == 0 && words == "0 100000 65536 0 200000 65536 0 65534 5 6 50", "{status}: {out}");
    let new = run.bundle.outside.join("upper/tmp/new").metadata().context("what was made is not on the host")?;
    ensure!((new.uid(), new.gid()) == (100_005, 200_006), "{new:?}");
    Ok(())
}

#[test]
fn ctr_maps_users_and_the_root_filesystem_with_them() -> Result<()> {
    let seen = ran(&["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"], OWNERS)?;
    let words = seen.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words == "0 100000 65536 0 100000 65536 0 0 5 6", "{seen}");
    Ok(())
}
