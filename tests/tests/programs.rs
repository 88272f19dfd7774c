//! What real programs expect of a container: a loopback interface, standard streams that can be opened by name, a home
//! and an environment. Each test runs under husk and under runc, and compares.

use anyhow::{Result, ensure};
use husk_tests::bundle;
use husk_tests::compare::{same, tested};
use husk_tests::containerd::Containerd;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

const SLEEP: [&str; 2] = ["sleep", "1000"];

fn in_user_namespace(spec: &mut Value) {
    bundle::append(spec, "/linux/namespaces", [json!({"type": "user"})]);
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_user_namespace_with_several_mappings_works() -> Result<()> {
    let maps = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; id -g";
    let text = same(|containerd| {
        let id = containerd.id("mappings");
        let mut spec = bundle::spec(&id, &SLEEP);
        bundle::append(&mut spec, "/linux/namespaces", [json!({"type": "user"})]);
        let one =
            |inside: u32, outside: u32, size: u32| json!({"containerID": inside, "hostID": outside, "size": size});
        spec["linux"]["uidMappings"] = json!([one(0, 100_000, 1000), one(1000, 5000, 1), one(1001, 300_000, 60_000)]);
        spec["linux"]["gidMappings"] = json!([one(0, 200_000, 1000), one(1000, 5000, 1)]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let shim = Shim::running(containerd, &id, &spec)?;
        let mut process = bundle::process(&["sh", "-c", maps]);
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let (status, mut out, errors) = shim.exec_process("maps", &process)?;
        ensure!(status == 0, "{errors}");
        let init = shim.script("init", "cat /proc/1/uid_map | tr -s ' '; stat -c '%u %g' /proc/1")?;
        out.push_str(&init);
        Ok(out)
    })?;
    ensure!(text.contains("1000 5000 1\n") && text.contains("1001 300000 60000\n"), "{text}");

    let containerd = tested()?;
    let id = containerd.id("overlapping");
    let mut spec = bundle::spec(&id, &SLEEP);
    in_user_namespace(&mut spec);
    let again = json!({"containerID": 7, "hostID": 900_000, "size": 1});
    bundle::append(&mut spec, "/linux/gidMappings", [again]);
    let error = Shim::start(containerd, &id, &spec)?.create_error()?;
    ensure!(error.contains("linux.gidMappings[1]: 7 900000 1: overlaps another mapping"), "{error}");
    Ok(())
}

/// Runs a container with a modified spec and returns its exit status, stdout and stderr.
fn run(
    containerd: &'static Containerd,
    name: &str,
    args: &[&str],
    change: impl Fn(&mut Value),
) -> Result<(u32, String, String)> {
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, args);
    change(&mut spec);
    Shim::start(containerd, &id, &spec)?.run()
}

const LOOPBACK: &str = "ip -o addr show lo | awk '{print $3, $4}'
    ping -c 1 -w 20 127.0.0.1 >/dev/null && echo reached
    ping -6 -c 1 -w 20 ::1 >/dev/null && echo reached";

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn programs_reach_themselves_over_the_loopback_interface() -> Result<()> {
    let plain = same(|containerd| containerd.script(&[], "lo", LOOPBACK))?;
    ensure!(plain == "inet 127.0.0.1/8\ninet6 ::1/128\nreached\nreached", "{plain}");
    // An unprivileged root needs no raw socket for a connection.
    let script = "ip -o addr show lo | awk '{print $3, $4}'; nc -l -p 7 -e echo reached & \
        for try in $(seq 50); do nc 127.0.0.1 7 </dev/null && break; usleep 100000; done";
    let mapped = same(|containerd| {
        let (status, out, err) = run(containerd, "lo-user", &["sh", "-c", script], in_user_namespace)?;
        ensure!(status == 0, "{status}: {out}\n{err}");
        Ok(out)
    })?;
    ensure!(mapped == "inet 127.0.0.1/8\ninet6 ::1/128\nreached", "{mapped}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn every_container_of_a_pod_has_a_loopback_interface_also_after_a_restart() -> Result<()> {
    let containerd = tested()?;
    let pod = containerd.id("lo-pod");
    let start = |id: &str| {
        let mut spec = bundle::spec(id, &SLEEP);
        spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": pod});
        Shim::running(containerd, id, &spec)
    };
    let check = |shim: &Shim, what: &str| {
        let found = shim.script("ping", LOOPBACK)?;
        ensure!(found == "inet 127.0.0.1/8\ninet6 ::1/128\nreached\nreached", "{what}: {found}");
        Ok(())
    };
    let pause = start(&pod)?;
    check(&pause, "the pod's first container")?;
    for restart in 0..2 {
        let id = containerd.id("lo-app");
        let app = start(&id)?;
        check(&app, &format!("restart {restart}"))?;
        app.task.kill(&id, "", 9)?;
        app.task.wait(&id, "")?;
        app.task.delete(&id, "")?;
        app.shutdown();
    }
    Ok(())
}

/// Writes to both streams by name, and prints to whom they belong.
const BY_NAME: &str = "echo out > /dev/stdout && echo err > /dev/stderr && echo again > /proc/self/fd/1 &&
    stat -L -c '%u %F' /dev/stdout /dev/stderr; id -u; id -G";

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_program_without_root_opens_its_output_by_name() -> Result<()> {
    let users = [
        json!({"uid": 0, "gid": 0}),
        json!({"uid": 1000, "gid": 1000}),
        json!({"uid": 101, "gid": 0, "additionalGids": [5, 2000]}),
    ];
    for user in users {
        let observe = |containerd, mapped: bool| {
            let (status, out, err) = run(containerd, "by-name", &["sh", "-c", BY_NAME], |spec| {
                spec["process"]["user"] = user.clone();
                if mapped {
                    in_user_namespace(spec);
                }
            })?;
            ensure!(status == 0 && err == "err", "{user}, mapped {mapped}: {status}\n{out}\n{err}");
            Ok(out)
        };
        let plain = same(|containerd| observe(containerd, false))?;
        ensure!(plain.starts_with(&format!("out\nagain\n{0} fifo\n{0} fifo\n", user["uid"])), "{user}: {plain}");
        // For runc, clients that use user namespaces name the owner of the pipes (IoUid); husk needs no help.
        let mapped = observe(tested()?, true)?;
        ensure!(mapped == plain, "{user}: {mapped}\n{plain}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_exec_without_root_opens_its_output_by_name() -> Result<()> {
    let observe = |containerd: &'static Containerd, mapped: bool| {
        let id = containerd.id("exec-by-name");
        let mut spec = bundle::spec(&id, &SLEEP);
        if mapped {
            in_user_namespace(&mut spec);
        }
        let shim = Shim::running(containerd, &id, &spec)?;
        let mut process = bundle::process(&["sh", "-c", BY_NAME]);
        process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5]});
        let (status, out, err) = shim.exec_process("user", &process)?;
        ensure!(status == 0 && err == "err", "mapped {mapped}: {status}\n{out}\n{err}");
        shim.task.kill(&id, "", 9)?;
        shim.task.wait(&id, "")?;
        shim.task.delete(&id, "")?;
        shim.shutdown();
        Ok(out)
    };
    let plain = same(|containerd| observe(containerd, false))?;
    ensure!(plain.starts_with("out\nagain\n1000 fifo\n1000 fifo\n1000\n"), "{plain}");
    let mapped = observe(tested()?, true)?;
    ensure!(mapped == plain, "{mapped}\n{plain}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_environment_keeps_its_order_and_home_is_never_missing() -> Result<()> {
    let environment = ["Z=1", "PATH=/bin:/usr/bin", "A=x=y", "Z=2", "EMPTY="];
    // `app` is in the image's passwd, the last user is not.
    for (uid, home) in [(0, "/root"), (1000, "/home/app"), (4242, "/")] {
        for set in [None, Some("HOME="), Some("HOME=/elsewhere")] {
            let env: Vec<&str> = set.into_iter().chain(environment).collect();
            let observe = |containerd| {
                let (status, out, err) = run(containerd, "env", &["env"], |spec| {
                    spec["process"]["user"] = json!({"uid": uid, "gid": 0});
                    spec["process"]["env"] = json!(env);
                })?;
                ensure!(status == 0, "{status}: {out}\n{err}");
                Ok(out)
            };
            let found = same(observe)?;
            let home = if set == Some("HOME=/elsewhere") { "/elsewhere" } else { home };
            ensure!(found.contains(&format!("HOME={home}")), "{uid} {set:?}: {found}");
            ensure!(found.contains("Z=2\nPATH=/bin:/usr/bin\nA=x=y\nEMPTY="), "{found}");
        }
    }
    for entry in ["NOVALUE", "=value"] {
        let id = tested()?.id("bad-env");
        let mut spec = bundle::spec(&id, &["true"]);
        bundle::append(&mut spec, "/process/env", [json!(entry)]);
        let message = Shim::start(tested()?, &id, &spec)?.create_error()?;
        ensure!(message.contains("process.env[1]: has no "), "{message}");
    }
    Ok(())
}
