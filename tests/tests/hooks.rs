//! The hooks of a spec that are programs of the host: nerdctl has two of them in every container. Those of `startContainer`, which run inside,
//! are in `flags.rs`.

use std::fs;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::process::Process;
use husk_tests::shim::{Shim, Streams};
use serde_json::{Value, json};

/// A hook that notes its name and the state that it is told of in the bundle, which it finds itself in, and does more then.
fn note(name: &str, more: &str) -> Value {
    let script = format!("{{ echo {name}; cat; echo; }} >> notes; {more}");
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 20}])
}

/// A serving shim for a container with these hooks.
fn with_hooks(name: &str, args: &[&str], hooks: Value) -> Result<Shim<'static>> {
    let containerd = Containerd::shared()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, args);
    spec["hooks"] = hooks;
    spec["annotations"] = json!({"org.example.colour": "green"});
    Shim::start(containerd, &id, &spec)
}

/// What the hooks have noted so far: their names, and the states that they were told of.
fn notes(shim: &Shim<'_>) -> Result<Vec<(String, Value)>> {
    let noted = fs::read_to_string(shim.bundle.outside.join("notes")).context("no hook has run")?;
    let lines: Vec<&str> = noted.lines().filter(|line| !line.is_empty()).collect();
    let note = |pair: &[&str]| Ok((pair[0].to_owned(), serde_json::from_str(pair[1]).with_context(|| noted.clone())?));
    lines.chunks_exact(2).map(note).collect()
}

fn names(shim: &Shim<'_>) -> Result<String> {
    Ok(notes(shim)?.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" "))
}

#[test]
fn hooks_run_at_their_points_and_are_told_of_the_container() -> Result<()> {
    // runc runs those of `poststart` when the container is created, before its process.
    let name = "hooks_run_at_their_points_and_are_told_of_the_container";
    if !Runtime::under_test().is_husk_or_tell(name) {
        return Ok(());
    }
    let hooks = json!({
        "prestart": note("prestart", ""), "createRuntime": note("createRuntime", ""),
        "poststart": note("poststart", ""), "poststop": note("poststop", ""),
    });
    let shim = with_hooks("hooks", &["sleep", "1000"], hooks)?;
    let id = &shim.bundle.id;
    shim.create(&Streams::default())?;
    ensure!(names(&shim)? == "prestart createRuntime");
    shim.task.start(id, "")?;
    ensure!(names(&shim)? == "prestart createRuntime poststart");
    shim.task.kill(id, "", 9)?;
    ensure!(shim.task.wait(id, "")? == 137);
    shim.task.delete(id, "")?;
    ensure!(names(&shim)? == "prestart createRuntime poststart poststop", "when Delete has answered");

    let states = ["creating", "creating", "running", "stopped"];
    for ((name, state), status) in notes(&shim)?.into_iter().zip(states) {
        ensure!(state["id"] == json!(id) && state["status"] == json!(status), "{name}: {state}");
        ensure!(state["bundle"] == json!(shim.bundle.path), "{name}: {state}");
        ensure!(state["annotations"]["org.example.colour"] == json!("green"), "{name}: {state}");
        // No process of the host is the container's; whoever looks for its namespaces must not find the host's.
        ensure!(state.get("pid").is_none(), "{name}: {state}");
    }
    Ok(())
}

#[test]
fn a_hook_that_fails_before_the_container_is_named_by_create_and_nothing_is_left() -> Result<()> {
    let hooks = json!({
        "createRuntime": note("createRuntime", "echo no luck >&2; exit 3"), "poststop": note("poststop", "exit 4"),
    });
    let shim = with_hooks("bad-hook", &["true"], hooks)?;
    let error = shim.refused()?;
    ensure!(error.contains("no luck"), "{error}");
    if shim.containerd().runtime() == Runtime::Husk {
        ensure!(error.contains("hooks.createRuntime[0] /bin/sh: exited with status 3"), "{error}");
        ensure!(names(&shim)? == "createRuntime poststop");
        ensure!(shim.log().contains("hook failed"), "the failure of the poststop hook is not logged");
    }
    ensure!(shim.task.state(&shim.bundle.id, "").is_err(), "the container is there");
    Ok(())
}

#[test]
fn a_container_whose_hook_fails_after_its_start_is_killed() -> Result<()> {
    // With runc it is Create that fails then.
    if !Runtime::under_test().is_husk_or_tell("a_container_whose_hook_fails_after_its_start_is_killed") {
        return Ok(());
    }
    let hooks = json!({"poststart": note("poststart", "exit 3")});
    let shim = with_hooks("late-hook", &["sleep", "1000"], hooks)?;
    let id = &shim.bundle.id;
    shim.create(&Streams::default())?;
    let error = shim.task.start(id, "").err().context("the start went well")?.to_string();
    ensure!(error.contains("hooks.poststart[0] /bin/sh: exited"), "{error}");
    ensure!(shim.task.wait(id, "")? == 137);
    shim.task.delete(id, "")?;
    Ok(())
}

#[test]
fn hooks_of_the_end_run_although_the_shim_was_killed() -> Result<()> {
    let hooks = json!({"createRuntime": note("createRuntime", ""), "poststop": note("poststop", "")});
    let shim = with_hooks("orphan", &["sleep", "1000"], hooks)?;
    shim.run_detached()?;
    let (serving, _) = shim.containerd().shim_of(&shim.bundle.id)?;
    serving.kill();
    husk_tests::command::wait_for(std::time::Duration::from_secs(10), "the shim is gone", || {
        Process::read(serving.pid).is_none_or(|process| process.zombie).then_some(())
    })?;
    shim.delete_action()?.ok()?;
    ensure!(names(&shim)? == "createRuntime poststop");
    Ok(())
}

#[test]
fn hooks_that_reach_into_the_container_and_networks_of_nerdctl_are_refused_by_name() -> Result<()> {
    let name = "hooks_that_reach_into_the_container_and_networks_of_nerdctl_are_refused_by_name";
    if !Runtime::under_test().is_husk_or_tell(name) {
        return Ok(());
    }
    let containerd = Containerd::shared()?;
    let id = containerd.id("refused");
    let mut spec = bundle::spec(&id, &["true"]);
    spec["annotations"] = json!({"nerdctl/networks": "[\"bridge\"]"});
    spec["hooks"] = json!({
        "createRuntime": [{"path": "/bin/containerd", "args": ["containerd", "oci-hook", "--pid={{pid}}"]}],
        "createContainer": [{"path": "/bin/inside"}],
        "poststop": [{"path": "relative", "timeout": -1}],
    });
    let error = Shim::start(containerd, &id, &spec)?.refused()?;
    for want in [
        "hooks.createRuntime[0].path \"/bin/containerd\": a program of the host cannot act on a container in a VM",
        "hooks.createContainer[0].path \"/bin/inside\": a program of the host cannot run",
        "hooks.poststop[0].path \"relative\": must be an absolute path",
        "hooks.poststop[0].timeout \"-1\": must be a number of seconds",
        "networks of the host (CNI) are not supported yet: use --network none",
    ] {
        ensure!(error.contains(want), "{want}: {error}");
    }
    Ok(())
}
