//! Hooks of a spec that run on the host; nerdctl adds two to every container. `flags.rs` tests `startContainer` hooks,
//! which run inside.

use std::fs;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::process::Process;
use husk_tests::shim::{Shim, Streams};
use serde_json::{Value, json};

/// A hook that appends its name and the state from its stdin to `notes` in the bundle, its working directory, and then
/// runs `more`.
fn note(name: &str, more: &str) -> Value {
    let script = format!("{{ echo {name}; cat; echo; }} >> notes; {more}");
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 20}])
}

/// Starts a shim for a container with these hooks.
fn with_hooks(name: &str, args: &[&str], hooks: Value) -> Result<Shim<'static>> {
    let containerd = Containerd::shared()?;
    let id = containerd.id(name);
    let mut spec = bundle::spec(&id, args);
    spec["hooks"] = hooks;
    spec["annotations"] = json!({"org.example.colour": "green"});
    Shim::start(containerd, &id, &spec)
}

/// The names of the hooks that have run, and the states that they received.
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
#[cfg_attr(runc, ignore = "about VMs")]
fn hooks_run_at_their_points_and_receive_the_containers_state() -> Result<()> {
    // runc runs `poststart` hooks at the container's creation, before its process.
    let hooks = json!({
        "prestart": note("prestart", ""), "createRuntime": note("createRuntime", ""),
        "poststart": note("poststart", ""), "poststop": note("poststop", ""),
    });
    let shim = with_hooks("hooks", &["sleep", "1000"], hooks)?;
    let id = &shim.bundle.id;
    let pid = shim.create(&Streams::default())?;
    ensure!(names(&shim)? == "prestart createRuntime");
    shim.task.start(id, "")?;
    ensure!(names(&shim)? == "prestart createRuntime poststart");
    shim.task.kill(id, "", 9)?;
    ensure!(shim.task.wait(id, "")? == 137);
    shim.task.delete(id, "")?;
    ensure!(
        names(&shim)? == "prestart createRuntime poststart poststop",
        "the poststop hook did not run before Delete returned"
    );

    let states = ["creating", "creating", "running", "stopped"];
    for ((name, state), status) in notes(&shim)?.into_iter().zip(states) {
        ensure!(state["id"] == json!(id) && state["status"] == json!(status), "{name}: {state}");
        ensure!(state["bundle"] == json!(shim.bundle.path), "{name}: {state}");
        ensure!(state["annotations"]["org.example.colour"] == json!("green"), "{name}: {state}");
        ensure!(state.get("pid") == (status != "stopped").then_some(&json!(pid)), "{name}: {pid} {state}");
    }
    Ok(())
}

#[test]
fn a_failing_hook_before_the_container_is_named_by_create_and_nothing_is_left_behind() -> Result<()> {
    let hooks = json!({
        "createRuntime": note("createRuntime", "echo no luck >&2; exit 3"), "poststop": note("poststop", "exit 4"),
    });
    let shim = with_hooks("bad-hook", &["true"], hooks)?;
    let error = shim.create_error()?;
    ensure!(error.contains("no luck"), "{error}");
    if shim.containerd().runtime() == Runtime::Husk {
        ensure!(error.contains("hooks.createRuntime[0] /bin/sh: exited with status 3"), "{error}");
        ensure!(names(&shim)? == "createRuntime poststop");
        ensure!(shim.log().contains("hook failed"), "the failed poststop hook is not logged");
    }
    ensure!(shim.task.state(&shim.bundle.id, "").is_err(), "the container exists");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_failing_poststart_hook_kills_the_container() -> Result<()> {
    // With runc, Create fails instead.
    let hooks = json!({"poststart": note("poststart", "exit 3")});
    let shim = with_hooks("late-hook", &["sleep", "1000"], hooks)?;
    let id = &shim.bundle.id;
    shim.create(&Streams::default())?;
    let error = shim.task.start(id, "").err().context("Start succeeded")?.to_string();
    ensure!(error.contains("hooks.poststart[0] /bin/sh: exited"), "{error}");
    ensure!(shim.task.wait(id, "")? == 137);
    shim.task.delete(id, "")?;
    Ok(())
}

#[test]
fn poststop_hooks_run_after_the_shim_was_killed() -> Result<()> {
    let hooks = json!({"createRuntime": note("createRuntime", ""), "poststop": note("poststop", "")});
    let shim = with_hooks("orphan", &["sleep", "1000"], hooks)?;
    shim.run_detached()?;
    let (serving, _) = shim.containerd().shim_of(&shim.bundle.id)?;
    serving.kill();
    husk_tests::command::wait_for(std::time::Duration::from_secs(60), "the shim is gone", || {
        Process::read(serving.pid).is_none_or(|process| process.zombie).then_some(())
    })?;
    shim.delete_action()?.ok()?;
    ensure!(names(&shim)? == "createRuntime poststop");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn hooks_that_need_the_containers_process_are_rejected_by_name() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("refused");
    let mut spec = bundle::spec(&id, &["true"]);
    spec["hooks"] = json!({
        "createRuntime": [{"path": "/bin/containerd", "args": ["containerd", "oci-hook", "--pid={{pid}}"]}],
        "createContainer": [{"path": "/bin/inside"}],
        "poststop": [{"path": "relative", "timeout": -1}],
    });
    let error = Shim::start(containerd, &id, &spec)?.create_error()?;
    for expected in [
        "hooks.createRuntime[0].path \"/bin/containerd\": a program of the host cannot act on a container in a VM",
        "hooks.createContainer[0].path \"/bin/inside\": a program of the host cannot run",
        "hooks.poststop[0].path \"relative\": must be an absolute path",
        "hooks.poststop[0].timeout \"-1\": must be a number of seconds",
    ] {
        ensure!(error.contains(expected), "{expected}: {error}");
    }
    Ok(())
}
