//! Isolation and limits of the spec are in force, as seen from inside the container.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::shim::{Shim, Streams};
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

/// Runs a shell script in a container with a modified default spec. Returns the exit status, and stdout with stderr.
fn run(name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<(u32, String)> {
    let containerd = Containerd::shared()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sh", "-c", script]);
    change(&mut spec);
    let (status, out, err) = Shim::start(containerd, &id, &spec)?.run()?;
    Ok((status, if err.is_empty() { out } else { format!("{out}\n{err}") }))
}

/// A command that prints the first of two files that exists: the cgroup v2 name, as in a VM, or the v1 name, as on a
/// host with runc.
fn cgroup_file(v2: &str, v1: &str) -> String {
    format!("cat /sys/fs/cgroup/{v2} 2>/dev/null || cat /sys/fs/cgroup/{v1}")
}

/// Creates and starts a container with a modified spec, which must fail, and returns the error message.
fn start_error(name: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    let containerd = Containerd::shared()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    change(&mut spec);
    let shim = Shim::start(containerd, &id, &spec)?;
    let error = match shim.create(&Streams::default()) {
        Err(e) => Some(format!("{e:#}")),
        Ok(_) => shim.task.start(&id, "").err().map(|e| e.to_string()),
    };
    error.context("the container was started")
}

#[test]
fn a_memory_limit_kills_the_process_that_exceeds_it() -> Result<()> {
    let script = format!("{}; dd if=/dev/zero of=/dev/shm/x bs=1M count=60 2>/dev/null; echo $?", {
        cgroup_file("memory.max", "memory/memory.limit_in_bytes")
    });
    let (_, out) = run("memory", &script, |spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20});
    })?;
    ensure!(out.lines().collect::<Vec<_>>() == ["33554432", "137"], "{out}");
    Ok(())
}

#[test]
fn a_process_limit_stops_a_fork_bomb() -> Result<()> {
    let script = format!("{}; for i in $(seq 40); do sleep 1 & done", cgroup_file("pids.max", "pids/pids.max"));
    let (_, out) = run("pids", &script, |spec| spec["linux"]["resources"]["pids"] = json!({"limit": 16}))?;
    ensure!(out.starts_with("16\n") && out.contains("fork"), "{out}");
    Ok(())
}

#[test]
fn cpu_quota_weight_and_set_are_applied() -> Result<()> {
    let files = [
        cgroup_file("cpu.max", "cpu/cpu.cfs_quota_us"),
        cgroup_file("cpu.weight", "cpu/cpu.shares"),
        // The host's CPUs are not the guest's: it has one.
        cgroup_file("cpuset.cpus.effective", "cpuset/cpuset.cpus"),
    ];
    let (_, out) = run("cpu", &files.join("; "), |spec| {
        spec["linux"]["resources"]["cpu"] = json!({"quota": 20_000, "period": 100_000, "shares": 512, "cpus": "0"});
    })?;
    let expected = match Runtime::under_test() {
        // 512 shares become weight 59 and 1024 become 100, as crun 1.23 and runc 1.4 convert them. (Older versions make
        // 20 of 512.)
        Runtime::Husk => ["20000 100000", "59", "0"],
        Runtime::Runc => ["20000", "512", "0"],
    };
    ensure!(out.lines().collect::<Vec<_>>() == expected, "{out}");
    Ok(())
}

#[test]
fn a_process_has_only_the_capabilities_of_the_spec() -> Result<()> {
    let script = "grep ^Cap /proc/self/status; chown 1:1 /tmp; hostname other";
    let (status, out) = run("caps", script, |spec| {
        let some = ["CAP_CHOWN", "CAP_KILL"];
        spec["process"]["capabilities"] =
            json!({"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN"], "effective": some, "permitted": some});
    })?;
    // CHOWN is 0, KILL 5, SYS_ADMIN 21 (linux/capability.h).
    let expected = ["0000000000000000", "0000000000000021", "0000000000000021", "0000000000200021", "0000000000000000"];
    let sets: Vec<&str> = out.lines().take(5).filter_map(|line| line.split_whitespace().nth(1)).collect();
    ensure!(sets == expected, "inheritable, permitted, effective, bounding, ambient: {out}");
    ensure!(status != 0 && !out.contains("chown:") && out.contains("hostname:"), "{out}");
    Ok(())
}

#[test]
fn root_without_capabilities_has_no_privileges() -> Result<()> {
    let script = "grep ^Cap /proc/self/status | grep -v 0000000000000000; chown 1:1 /tmp; mount -t tmpfs t /tmp";
    let (_, out) = run("no-caps", script, |spec| spec["process"]["capabilities"] = json!({}))?;
    ensure!(!out.contains("Cap") && out.contains("chown:") && out.contains("mount:"), "{out}");
    Ok(())
}

fn forbid_mkdir(spec: &mut Value) {
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                "args": [{"index": 1, "value": 0o123, "op": "SCMP_CMP_EQ"}, ]},
        ],
    });
    // The mode is the second argument of chmod and the third of fchmodat: the rule must match chmod only.
    spec["linux"]["seccomp"]["syscalls"][1]["names"] = json!(["chmod"]);
}

#[test]
fn the_seccomp_filter_rejects_the_listed_calls() -> Result<()> {
    let script = "grep ^Seccomp: /proc/self/status; mkdir /tmp/new; chmod 123 /tmp; chmod 755 /tmp && echo fine";
    for no_new_privileges in [true, false] {
        let (_, out) = run("seccomp", script, |spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            forbid_mkdir(spec);
        })?;
        let fields: Vec<&str> = out.split_whitespace().collect();
        ensure!(fields.starts_with(&["Seccomp:", "2"]), "noNewPrivileges {no_new_privileges}: {out}");
        ensure!(out.contains("mkdir:") && out.contains("not implemented"), "{no_new_privileges}: {out}");
        ensure!(out.contains("chmod:") && out.contains("fine"), "noNewPrivileges {no_new_privileges}: {out}");
    }
    Ok(())
}

#[test]
fn a_seccomp_profile_older_than_the_runtime_lets_programs_start() -> Result<()> {
    let newer = ["faccessat2", "statx", "openat2", "close_range", "clone3", "rseq", "fchmodat2"];
    for no_new_privileges in [true, false] {
        let (status, out) = run("old-profile", "echo started", |spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": newer, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            });
        })?;
        ensure!((status, out.as_str()) == (0, "started"), "noNewPrivileges {no_new_privileges}: {status} {out}");
    }
    Ok(())
}

#[test]
fn rlimits_of_the_process_are_set() -> Result<()> {
    let (_, out) = run("rlimits", "cat /proc/self/limits", |spec| {
        spec["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 768},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 100, "hard": 200},
        ]);
    })?;
    let limit = |name: &str| -> Vec<&str> {
        let line = out.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().take(2).collect()
    };
    ensure!(limit("Max open files") == ["512", "768"], "{out}");
    ensure!(limit("Max core file size") == ["0", "0"], "{out}");
    ensure!(limit("Max processes") == ["100", "200"], "{out}");
    Ok(())
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_reject_writes() -> Result<()> {
    let script = "wc -c < /proc/version; ls -A /etc | wc -l; echo 1 > /proc/sys/kernel/panic; touch /var/new; \
        ls -d /var; touch /tmp/fine && echo fine";
    let (_, out) = run("masked", script, |spec| {
        let more =
            [("maskedPaths", ["/proc/version", "/etc", "/not/there"]), ("readonlyPaths", ["/var", "/nor", "/or"])];
        for (list, more) in more {
            bundle::append(spec, &format!("/linux/{list}"), more.map(Value::from));
        }
    })?;
    ensure!(out.lines().take(4).collect::<Vec<_>>() == ["0", "0", "/var", "fine"], "{out}");
    ensure!(out.matches("Read-only file system").count() == 2, "{out}");
    Ok(())
}

#[test]
fn the_container_has_its_own_namespaces() -> Result<()> {
    let script = "echo $$; hostname; cat /proc/self/cgroup; tail -n +3 /proc/net/dev | cut -d: -f1; ps | wc -l; \
        mount -t tmpfs t /tmp 2>&1 | head -c 5; cat /proc/sysvipc/shm | wc -l";
    let (_, out) = run("namespaces", script, |spec| {
        bundle::append(spec, "/linux/namespaces", [json!({"type": "cgroup"})]);
        spec["hostname"] = json!("inside");
    })?;
    ensure!(out.starts_with("1\ninside\n"), "{out}");
    ensure!(out.lines().filter(|line| line.contains(":/")).all(|line| line.ends_with(":/")), "cgroup path: {out}");
    ensure!(out.lines().any(|line| line.trim() == "lo") && !out.contains("eth"), "{out}");
    Ok(())
}

#[test]
fn no_new_privileges_follows_the_spec() -> Result<()> {
    for (value, expected) in [(true, "1"), (false, "0")] {
        let (_, out) = run("nnp", "grep ^NoNewPrivs /proc/self/status", |spec| {
            spec["process"]["noNewPrivileges"] = json!(value);
        })?;
        ensure!(out.split_whitespace().nth(1) == Some(expected), "noNewPrivileges {value}: {out}");
    }
    Ok(())
}

#[test]
fn the_process_runs_as_the_user_groups_and_umask_of_the_spec() -> Result<()> {
    let (_, out) = run("user", "id -u; id -g; grep ^Groups /proc/self/status; umask; touch /root/x", |spec| {
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 2000], "umask": 0o27});
    })?;
    let lines: Vec<String> = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    ensure!(lines.len() > 3 && lines[0] == "1000" && lines[1] == "1001" && lines[3] == "0027", "{out}");
    let mut groups: Vec<&str> = lines[2].split(' ').skip(1).collect();
    groups.sort_unstable();
    groups.retain(|group| *group != "1001");
    ensure!(groups == ["2000", "5"], "{out}");
    ensure!(out.contains("Permission denied"), "{out}");
    Ok(())
}

#[test]
fn a_read_only_root_rejects_writes_and_its_mounts_accept_them() -> Result<()> {
    let script = "touch /new; touch /etc/passwd; touch /run/fine && echo fine";
    let (_, out) = run("read-only", script, |spec| spec["root"]["readonly"] = json!(true))?;
    ensure!(out.matches("Read-only file system").count() == 2 && out.contains("fine"), "{out}");
    Ok(())
}

#[test]
fn a_device_without_a_rule_cannot_be_opened() -> Result<()> {
    // kmsg is 1:11 and full is 1:7 (Linux's devices.txt). The default rules allow only full.
    let script = "mknod /tmp/kmsg c 1 11; mknod /tmp/full c 1 7; true >/tmp/kmsg; head -c 1 /tmp/full | wc -c; \
        head -c 3 /dev/mine | wc -c; ls -l /dev/mine; echo x > /dev/null && echo fine";
    let (_, out) = run("devices", script, |spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 0, "gid": 5}]);
    })?;
    ensure!(out.contains("/tmp/kmsg") && out.contains("Operation not permitted"), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    ensure!(lines.starts_with(&["1", "3"]) && lines[2].starts_with("crw-r-----") && out.contains("fine"), "{out}");
    Ok(())
}

#[test]
fn address_space_layout_is_randomised() -> Result<()> {
    let script = "for n in 1 2 3 4; do grep stack /proc/self/maps; done | sort -u | wc -l; cat /proc/sys/kernel/randomize_va_space";
    let (status, out) = run("addresses", script, |_| ())?;
    ensure!((status, out.as_str()) == (0, "4\n2"), "{status} {out}");
    Ok(())
}

#[test]
fn the_oom_score_follows_the_spec_and_is_not_inherited() -> Result<()> {
    let (_, out) = run("oom", "cat /proc/self/oom_score_adj", |spec| spec["process"]["oomScoreAdj"] = json!(321))?;
    ensure!(out == "321", "{out}");
    if Runtime::under_test() == Runtime::Husk {
        let (_, out) = run("oom", "cat /proc/self/oom_score_adj", |_| {})?;
        ensure!(out == "0", "inherited from PID 1: {out}");
    }
    Ok(())
}

#[test]
fn an_exec_follows_its_own_process_spec() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("exec");
    let shim = Shim::running(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let script = "id -u; id -g; pwd; echo $COLOUR; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; ulimit -n";
    let mut process = bundle::process(&["sh", "-c", script]);
    process["user"] = json!({"uid": 7, "gid": 8});
    process["cwd"] = json!("/var");
    process["env"] = json!(["PATH=/bin", "COLOUR=green"]);
    process["noNewPrivileges"] = json!(false);
    process["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]);
    let (io, mut stdout, mut stderr) = shim.streams("e")?;
    shim.start_exec("e", &process, &io)?;
    let deadline = Duration::from_secs(60);
    let (out, err) = (stdout.read_to_end(deadline)?, stderr.read_to_end(deadline)?);
    let fields = String::from_utf8_lossy(&out).split_whitespace().collect::<Vec<_>>().join(" ");
    let expected = "7 8 /var green CapEff: 0000000000000000 NoNewPrivs: 0 99";
    ensure!(fields == expected, "{fields}\n{}", String::from_utf8_lossy(&err));
    Ok(())
}

#[test]
fn a_limit_that_cannot_be_applied_is_named_in_the_error() -> Result<()> {
    let husk = Runtime::under_test() == Runtime::Husk;
    let message =
        start_error("unified", |spec| spec["linux"]["resources"]["unified"] = json!({"memory.nonsense": "1"}))?;
    ensure!(message.contains("memory.nonsense") || !husk, "{message}");
    let message = start_error("cpuset", |spec| spec["linux"]["resources"]["cpu"] = json!({"cpus": "4000"}))?;
    ensure!(message.contains("cpuset"), "{message}");
    Ok(())
}

#[test]
fn a_missing_command_is_named() -> Result<()> {
    let message = start_error("command", |spec| spec["process"]["args"] = json!(["/no/such/command"]))?;
    ensure!(message.contains("/no/such/command"), "{message}");
    Ok(())
}

#[test]
fn the_flags_of_ctr_run_reach_the_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    let flags = ["--memory-limit", "67108864", "--cpus", "0.5", "--read-only", "--seccomp", "--env", "COLOUR=red"];
    let cgroup = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let more = ["--cwd", "/var", "--cap-drop", "CAP_CHOWN", "--mount", cgroup];
    let script = [
        &cgroup_file("memory.max", "memory/memory.limit_in_bytes"),
        &cgroup_file("cpu.max", "cpu/cpu.cfs_quota_us"),
        "touch /new",
        "grep ^Seccomp: /proc/self/status | tr -dc 0-9; echo",
        "echo $COLOUR; pwd",
        "grep ^CapEff /proc/self/status | cut -f2",
    ];
    let ran = containerd.run(&[&flags[..], &more].concat(), &containerd.id("flags"), &["sh", "-c", &script.join(";")]);
    let ran = ran.ok()?;
    let text = ran.text();
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 6, "{ran}");
    ensure!(lines[0] == "67108864" && lines[1].starts_with("50000"), "{ran}");
    ensure!(lines[2..5] == ["2", "red", "/var"], "{ran}");
    let effective = u64::from_str_radix(lines[5], 16)?;
    ensure!(effective & 1 == 0 && effective != 0, "CAP_CHOWN was not dropped: {ran}");
    ensure!(ran.errors().contains("Read-only file system"), "{ran}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_container_cannot_open_vsock_sockets() -> Result<()> {
    let containerd = Containerd::shared()?;
    let probe = guest_program("probe")?;
    let mount = format!("type=bind,src={},dst=/probe,options=rbind:ro", probe.display());
    // 40 is AF_VSOCK, 1 is AF_UNIX (linux/socket.h).
    let script = "/probe socket 40 || echo $?; /probe socket 1; grep ^Seccomp: /proc/self/status | cut -f2";
    // Without its own seccomp filter, with one, and with all privileges that ctr can grant.
    for (more, seccomp) in [(&[][..], "0"), (&["--seccomp"], "2"), (&["--privileged"], "0")] {
        let output = containerd.script(&[&["--mount", &mount], more].concat(), "vsock", script)?;
        let lines: Vec<&str> = output.lines().collect();
        ensure!(
            lines.len() == 4 && lines[0].starts_with("refused") && lines[1..] == ["1", "granted", seccomp],
            "{more:?}: {output}"
        );
    }
    Ok(())
}
