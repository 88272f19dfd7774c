//! Specs that contain more than husk knows, or more than fits.

use anyhow::{Result, ensure};
use husk_tests::bundle;
use husk_tests::compare::{same, tested};
use husk_tests::containerd::Containerd;
use husk_tests::shim::Shim;
use serde_json::{Value, json};

const CAPABILITIES: &str = "grep -E 'Cap(Bnd|Eff|Prm)' /proc/self/status";

/// Adds to every part of a spec what no runtime knows yet.
fn from_the_future(spec: &mut Value) {
    spec["quirks"] = json!({"speed": 9});
    spec["linux"]["warp"] = json!("on");
    spec["linux"]["resources"]["memory"] = json!({"futureLimit": 5});
    spec["mounts"][0]["colour"] = json!("blue");
    spec["process"]["mood"] = json!(["good"]);
    for set in ["bounding", "effective", "permitted"] {
        bundle::append(spec, &format!("/process/capabilities/{set}"), [json!("CAP_FUTURE")]);
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn what_a_runtime_does_not_know_is_ignored_and_named_in_the_log() -> Result<()> {
    let observe = |containerd: &'static Containerd| {
        let id = containerd.id("future");
        let mut spec = bundle::spec(&id, &["sleep", "1000"]);
        from_the_future(&mut spec);
        let shim = Shim::running(containerd, &id, &spec)?;
        let mut process = bundle::process(&["sh", "-c", CAPABILITIES]);
        process["mood"] = json!(1);
        bundle::append(&mut process, "/capabilities/effective", [json!("CAP_FUTURE")]);
        bundle::append(&mut process, "/capabilities/permitted", [json!("CAP_LATER")]);
        let (status, out, err) = shim.exec_process("future", &process)?;
        ensure!(status == 0, "{status}: {out}\n{err}");
        let init = shim.script("init", "grep -E 'Cap(Bnd|Eff|Prm)' /proc/1/status")?;
        let log = shim.log();
        shim.task.kill(&id, "", 9)?;
        shim.task.wait(&id, "")?;
        shim.task.delete(&id, "")?;
        shim.shutdown();
        Ok((format!("{out}\n{init}"), log))
    };
    same(|containerd| Ok(observe(containerd)?.0))?;
    let (_, log) = observe(tested()?)?;
    for part in [
        "quirks: unknown field",
        "linux.warp: unknown field",
        "linux.resources.memory.futureLimit: unknown field",
        "mounts[0].colour: unknown field",
        "process.mood: unknown field",
        "process.capabilities.bounding: unknown capability \\\"CAP_FUTURE\\\"",
        "process.capabilities.permitted: unknown capability \\\"CAP_LATER\\\"",
    ] {
        ensure!(log.contains(part), "{part}: {log}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_known_field_that_cannot_be_applied_is_still_rejected() -> Result<()> {
    let id = tested()?.id("known");
    let mut spec = bundle::spec(&id, &["true"]);
    from_the_future(&mut spec);
    spec["linux"]["intelRdt"] = json!({"closID": "a"});
    let message = Shim::start(tested()?, &id, &spec)?.create_error()?;
    ensure!(message.contains("linux.intelRdt: ") && !message.contains("quirks"), "{message}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_large_spec_works_and_one_that_is_too_large_is_rejected_by_field_and_size() -> Result<()> {
    let with_annotation = |containerd: &'static Containerd, length: usize| {
        let id = containerd.id("large");
        let mut spec = bundle::spec(&id, &["echo", "ran"]);
        spec["annotations"] = json!({"org.example.large": "x".repeat(length)});
        Shim::start(containerd, &id, &spec)
    };
    let found = same(|containerd| Ok(with_annotation(containerd, 4_000_000)?.run()?.1))?;
    ensure!(found == "ran", "{found}");
    let message = with_annotation(tested()?, 4_300_000)?.create_error()?;
    ensure!(message.contains("annotations.org.example.large: has 4300002 bytes of a spec of 43"), "{message}");
    Ok(())
}
