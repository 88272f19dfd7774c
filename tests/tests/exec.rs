//! Execs: their whole process spec takes effect, and so do the container's own limits.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use containerd_shim_protos::ttrpc;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

fn running<'a>(containerd: &'a Containerd, name: &str, change: impl FnOnce(&mut Value)) -> Result<Shim<'a>> {
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, &["sleep", "1000"]);
    change(&mut spec);
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    Ok(shim)
}

/// Runs a shell script as an exec with a modified process, and returns its output, separated by single spaces.
fn exec_output(shim: &Shim, exec: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    let mut process = bundle::process(&["sh", "-c", script]);
    change(&mut process);
    let (_, out, err) = shim.exec_process(exec, &process).with_context(|| exec.to_owned())?;
    Ok(format!("{out} {err}").split_whitespace().collect::<Vec<_>>().join(" "))
}

#[test]
fn the_whole_process_spec_of_an_exec_takes_effect() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "spec", |_| {})?;
    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 2000], "umask": 0o27});
    let out =
        exec_output(&shim, "user", "id -u; id -g; umask; id -G; touch /root/x", |process| process["user"] = user)?;
    // runc 1.1 sets no umask for an exec.
    let umask = if Runtime::under_test() == Runtime::Husk { "0027" } else { "0022" };
    let expected = format!("1000 1001 {umask} 1001 5 2000 ");
    ensure!(out.starts_with(&expected) && out.contains("Permission denied"), "{out}");

    let limits = "ulimit -n; ulimit -Hn; ulimit -c; ulimit -u";
    let out = exec_output(&shim, "limits", limits, |process| {
        let limit =
            |kind: &str, soft: u64, hard: u64| json!({"type": format!("RLIMIT_{kind}"), "soft": soft, "hard": hard});
        process["rlimits"] = json!([limit("NOFILE", 99, 199), limit("CORE", 0, 0), limit("NPROC", 50, 60)]);
    })?;
    ensure!(out == "99 199 0 50", "{out}");

    let status = "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status; echo $HOME-$A";
    let out = exec_output(&shim, "caps", status, |process| {
        // CHOWN is 0, KILL is 5.
        let (one, two) = (json!(["CAP_KILL"]), json!(["CAP_KILL", "CAP_CHOWN"]));
        process["capabilities"] =
            json!({"bounding": two, "permitted": two, "effective": one, "inheritable": one, "ambient": one});
        process["env"] = json!(["PATH=/bin", "A=b=c"]);
    })?;
    let expected = ["Inh", "Prm", "Eff", "Bnd", "Amb"].iter().zip(["20", "21", "20", "21", "20"]);
    // The permitted set also depends on the user: execve(2) grants capabilities to root.
    let caps: Vec<String> = expected.map(|(kind, set)| format!("Cap{kind}: {set:0>16}")).collect();
    ensure!(out.ends_with("NoNewPrivs: 1 /root-b=c"), "{out}");
    for part in [&caps[0], &caps[3]] {
        ensure!(out.contains(part), "no {part}: {out}");
    }
    let out = exec_output(&shim, "oom", "cat /proc/self/oom_score_adj", |process| process["oomScoreAdj"] = json!(77))?;
    ensure!(out == "77", "{out}");

    // Settings without a meaning in a guest are ignored, with a log line.
    let out =
        exec_output(&shim, "labels", "echo fine", |process| process["apparmorProfile"] = json!("docker-default"))?;
    if Runtime::under_test() == Runtime::Husk {
        ensure!(out == "fine", "{out}");
    }
    Ok(())
}

#[test]
fn the_containers_seccomp_filter_applies_to_its_execs() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "filter", |spec| {
        let rule = json!({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38});
        spec["linux"]["seccomp"] =
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [rule]});
    })?;
    let script = "grep ^Seccomp: /proc/self/status; grep ^CapEff /proc/self/status; mkdir /tmp/new; rmdir /tmp/new";
    let mut number = 0;
    for no_new_privileges in [true, false] {
        for uid in [0, 1000] {
            for capabilities in [bundle::process(&[])["capabilities"].clone(), json!({})] {
                number += 1;
                let case = format!("noNewPrivileges {no_new_privileges}, user {uid}, {capabilities}");
                let out = exec_output(&shim, &format!("e{number}"), script, |process| {
                    process["noNewPrivileges"] = json!(no_new_privileges);
                    process["user"] = json!({"uid": uid, "gid": uid});
                    process["capabilities"] = capabilities.clone();
                })?;
                ensure!(out.starts_with("Seccomp: 2 ") && out.contains("not implemented"), "{case}: {out}");
                // Loading a filter can require CAP_SYS_ADMIN, bit 21. The process must not keep it.
                let effective = out.split_whitespace().nth(3).unwrap_or_default();
                let effective = u64::from_str_radix(effective, 16).with_context(|| format!("{case}: {out}"))?;
                ensure!(effective & 1 << 21 == 0, "{case}: {out}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_failed_exec_has_runcs_error_message_and_leaves_nothing_behind() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "cannot", |_| {})?;
    let id = shim.bundle.id.as_str();
    let start_error = |exec: &str, args: Value, cwd: &str| -> Result<String> {
        let mut process = bundle::process(&[]);
        (process["args"], process["cwd"]) = (args, json!(cwd));
        shim.task.exec(id, exec, &process, &Default::default())?;
        let started = shim.task.start(id, exec);
        shim.task.delete(id, exec)?;
        match started {
            Err(ttrpc::Error::RpcStatus(status)) => Ok(status.message),
            other => Err(anyhow!("{exec}: {other:?}")),
        }
    };
    let cases = [
        ("absent", json!(["absent"]), "/", r#"exec: "absent": executable file not found in $PATH"#),
        ("path", json!(["/no/such"]), "/", r#"exec: "/no/such": stat /no/such: no such file or directory"#),
        ("file", json!(["/etc/passwd"]), "/", r#"exec: "/etc/passwd": permission denied"#),
        ("folder", json!(["/etc"]), "/", r#"exec: "/etc": "#),
        ("cwd", json!(["true"]), "/no/such", "no such file or directory"),
    ];
    for (exec, args, cwd, expected) in cases {
        // The second round shows that the id is free again.
        for _ in 0..2 {
            let message = start_error(exec, args.clone(), cwd)?;
            ensure!(message.contains(expected), "{exec}: {message}");
        }
    }
    ensure!(shim.task.pids(&shim.bundle.id)?.len() == 1, "a process remains");
    ensure!(shim.script("after", "echo fine")? == "fine");
    Ok(())
}

#[test]
fn an_exec_that_failed_to_start_blocks_nobody() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "failed", |_| {})?;
    let id = shim.bundle.id.as_str();
    shim.task.exec(id, "fails", &bundle::process(&["/no/such"]), &Default::default())?;
    shim.task.exec(id, "never", &bundle::process(&["true"]), &Default::default())?;
    ensure!(shim.task.start(id, "fails").is_err());
    // The init's exit must not wait for an exec that never ran.
    shim.task.kill(id, "", 9)?;
    ensure!(shim.task.wait(id, "")? == 137);
    let events = shim.events.until("/tasks/exit", Duration::from_secs(60))?;
    ensure!(!events.iter().any(|event| event.topic == "/tasks/exec-started"), "{events:?}");
    if Runtime::under_test() == Runtime::Husk {
        ensure!(shim.task.wait(id, "fails")? == 255, "wrong status of an exec that failed to start");
        let waits = thread::spawn({
            let (task, id) = (shim.task.clone(), id.to_owned());
            move || task.wait(&id, "never")
        });
        shim.task.delete(id, "never")?;
        ensure!(
            waits.join().map_err(|_| anyhow!("the wait panicked"))?.is_err(),
            "the wait for a deleted exec succeeded"
        );
        shim.task.delete(id, "fails")?;
    }
    shim.task.delete(id, "")?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn execs_work_in_a_container_that_delegates_its_cgroup() -> Result<()> {
    let containerd = Containerd::shared()?;
    let script = "set -e; cd /sys/fs/cgroup; mkdir init other; echo 1 > init/cgroup.procs; \
        echo '+memory +pids' > cgroup.subtree_control; echo ready; sleep 1000";
    let id = containerd.id("delegates");
    let mut spec = bundle::spec(&id, &["sh", "-c", script]);
    bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "cgroup"})]);
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["rw", "nosuid", "noexec", "nodev"]);
        }
    }
    let shim = Shim::start(containerd, &id, &spec)?;
    let (io, mut stdout, stderr) = shim.streams("init")?;
    shim.create_and_start(&io)?;
    // An exec cannot be used to check for readiness: while a process is in the group, the group cannot be delegated.
    let output = stdout.read(64, Duration::from_secs(20))?;
    ensure!(output == b"ready\n", "{}", String::from_utf8_lossy(&stderr.available()?));
    let out = shim.script("inside", "cat /sys/fs/cgroup/cgroup.subtree_control /proc/self/cgroup")?;
    ensure!(out == "memory pids\n0::/init", "{out}");
    let metrics = shim.task.metrics(&shim.bundle.id)?;
    ensure!(metrics.pids.current == 1 && shim.task.pids(&shim.bundle.id)?.len() == 1, "{metrics}");
    Ok(())
}

#[test]
fn a_hundred_concurrent_execs_keep_their_own_status_and_output() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "hundred", |_| {})?;
    let one = |number: u32| -> Result<()> {
        let script = format!("echo {number}; exit {number}");
        let (status, out, _) = shim.exec_process(&format!("e{number}"), &bundle::process(&["sh", "-c", &script]))?;
        ensure!(status == number && out == number.to_string(), "exec {number}: {status} {out:?}");
        Ok(())
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..100).map(|number| scope.spawn(move || one(number))).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("an exec panicked"))?)
    })?;
    ensure!(shim.task.pids(&shim.bundle.id)?.len() == 1, "a process remains");
    Ok(())
}

fn in_user_namespace(spec: &mut Value) {
    bundle::append(spec, "/linux/namespaces", [json!({"type": "user"})]);
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
}

/// Prints the credentials of a process, from the kernel's view.
const CREDENTIALS: &str = "readlink /proc/self/ns/user; cat /proc/self/uid_map /proc/self/gid_map; \
    grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs)' /proc/self/status";

#[test]
fn an_exec_in_a_user_namespace_has_the_credentials_of_the_init() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("userns");
    let script = format!("({CREDENTIALS}) > /run/init; sleep 1000");
    let mut spec = bundle::spec(&id, &["sh", "-c", &script]);
    in_user_namespace(&mut spec);
    let shim = Shim::start(containerd, &id, &spec)?;
    shim.run_detached()?;
    let ready = "until [ \"$(grep -c NoNewPrivs /run/init 2>/dev/null)\" = 1 ]; do :; done; id -u; id -g";
    ensure!(exec_output(&shim, "ready", ready, |_| {})? == "0 0");
    let before = shim.task.pids(&shim.bundle.id)?.len();
    let exec = shim.script("credentials", CREDENTIALS)?;
    let init = shim.script("init", "cat /run/init")?;
    ensure!(exec == init && exec.contains("100000") && exec.contains("CapEff"), "exec:\n{exec}\ninit:\n{init}");

    // The exec owns the files that it creates. Files of the guest's root belong to nobody and are protected.
    let files = "cd /tmp && touch new && chown 5:6 new && stat -c '%u %g' new; stat -c %u /etc; chown 0 /etc; echo 1 > /proc/sys/kernel/panic";
    let out = exec_output(&shim, "files", files, |_| {})?;
    ensure!(out.starts_with("5 6 65534 ") && out.contains("chown: /etc") && out.contains("panic"), "{out}");

    let user = json!({"uid": 1000, "gid": 1001, "additionalGids": [5]});
    let out =
        exec_output(&shim, "user", "id -u; id -g; id -G; grep CapEff /proc/self/status; echo $HOME", |process| {
            process["user"] = user.clone();
        })?;
    ensure!(out == "1000 1001 1001 5 CapEff: 0000000000000000 /home/app", "{out}");
    let out = exec_output(&shim, "home", "echo $HOME", |process| process["env"] = json!(["PATH=/bin", "HOME=/own"]))?;
    ensure!(out == "/own", "{out}");

    // The first user beyond the map.
    let mut unmapped = bundle::process(&["id"]);
    unmapped["user"] = json!({"uid": 65_536, "gid": 0});
    let error = shim.exec_process("unmapped", &unmapped).err().context("an exec with an unmapped user ran")?;
    if Runtime::under_test() == Runtime::Husk {
        ensure!(format!("{error:#}").contains("process.user.uid: become user 65536"), "{error:#}");
    }
    ensure!(shim.task.pids(&shim.bundle.id)?.len() == before, "a process remains");
    Ok(())
}

#[test]
fn an_exec_in_a_user_namespace_gets_the_containers_filter_and_its_own_terminal() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = running(containerd, "userns-filter", |spec| {
        in_user_namespace(spec);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        });
    })?;
    for no_new_privileges in [true, false] {
        let script = "mkdir /tmp/x; grep -E '^(CapEff|Seccomp:|NoNewPrivs)' /proc/self/status";
        let exec = format!("filtered-{no_new_privileges}");
        let out = exec_output(&shim, &exec, script, |process| {
            process["noNewPrivileges"] = json!(no_new_privileges);
            process["capabilities"] =
                json!({"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]});
        })?;
        let flag = u8::from(no_new_privileges);
        let expected = format!("CapEff: 0000000000000020 NoNewPrivs: {flag} Seccomp: 2 ");
        ensure!(out.starts_with(&expected) && out.contains("not implemented"), "{no_new_privileges}: {out}");
    }

    let mut process = bundle::process(&["sh", "-c", "stat -c 'owned by %u' $(tty); echo opened > $(tty)"]);
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    let (io, _input, mut output) = shim.terminal("tty")?;
    let id = &shim.bundle.id;
    shim.start_exec("tty", &process, &io)?;
    let text = String::from_utf8_lossy(&output.read_to_end(Duration::from_secs(60))?).into_owned();
    ensure!(text == "owned by 1000\r\nopened\r\n", "{text}");
    ensure!(shim.task.wait(id, "tty")? == 0);
    Ok(())
}
