//! Error codes that clients branch on: husk's shim returns those of containerd's runc shim for the same calls in the
//! same states.

use std::fmt::Debug;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::shim::{Shim, Streams};
use serde_json::{Value, json};

/// Where husk returns a specific code and runc's shim returns Unknown: state and call, runc's code, husk's code.
const MORE_SPECIFIC: &[(&str, Code, Code)] = &[
    ("created: CloseIO of an unknown exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("created: Kill with an invalid signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("created: Create", Code::UNKNOWN, Code::ALREADY_EXISTS),
    ("created: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("created: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: CloseIO of an unknown exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("running: Kill with an invalid signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("running: Create", Code::UNKNOWN, Code::ALREADY_EXISTS),
    ("running: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Update with an invalid value", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("running exec: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running exec: Kill with an invalid signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("exited exec: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("exec of a missing command: Start", Code::UNKNOWN, Code::INTERNAL),
    ("paused: CloseIO of an unknown exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("paused: Kill with an invalid signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("paused: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Start of an exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Delete of a running exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: CloseIO of an unknown exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("stopped: Update with empty resources", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("never started: Start after Kill", Code::UNKNOWN, Code::FAILED_PRECONDITION),
];

/// Where State differs from runc's shim, which reports an exec that failed to start as one that can still be started.
const DIFFERENT_STATES: &[(&str, &str, &str)] = &[(
    "exec of a missing command: State",
    "\"absent\" \"\" CREATED false 0 not exited",
    "\"absent\" \"\" STOPPED false 255 exited",
)];

/// The result code of each call in order, and the responses of State.
#[derive(Default)]
struct Results {
    codes: Vec<(String, Code)>,
    states: Vec<(String, String)>,
}

impl Results {
    fn extend(&mut self, other: Self) {
        self.codes.extend(other.codes);
        self.states.extend(other.states);
    }
}

struct Caller<'a> {
    shim: &'a Shim<'a>,
    id: String,
    state: &'static str,
    results: Results,
}

fn code_of<T>(result: ttrpc::Result<T>) -> Result<Code> {
    match result {
        Ok(_) => Ok(Code::OK),
        Err(ttrpc::Error::RpcStatus(status)) => Ok(status.code()),
        Err(other) => Err(other).context("a failure without a code"),
    }
}

impl Caller<'_> {
    fn note<T>(&mut self, call: &str, result: ttrpc::Result<T>) -> Result<()> {
        let code = code_of(result).with_context(|| format!("{}: {call}", self.state))?;
        self.results.codes.push((format!("{}: {call}", self.state), code));
        Ok(())
    }

    fn state(&mut self, call: &str, exec: &str) -> Result<()> {
        let result = self.shim.task.state(&self.id, exec);
        if let Ok(state) = &result {
            let exited =
                if state.exited_at.as_ref().is_some_and(|at| at.seconds > 0) { "exited" } else { "not exited" };
            let process = state.id.replace(&self.id, "ID");
            let (status, pid) = (state.status.enum_value_or_default(), state.pid > 0);
            let text = format!("{process:?} {:?} {status:?} {pid} {} {exited}", state.exec_id, state.exit_status);
            self.results.states.push((format!("{}: {call}", self.state), text));
        }
        self.note(call, result)
    }

    fn call<Q: Message>(&mut self, name: &str, method: &str, request: Q) -> Result<()> {
        let result = self.shim.task.call::<Q, api::Empty>(method, &request);
        self.note(name, result)
    }

    fn exec(&mut self, name: &str, exec: &str, args: &[&str]) -> Result<()> {
        let spec = protobuf_any("Process", &bundle::process(args));
        let request = api::ExecProcessRequest { id: self.id.clone(), exec_id: exec.into(), spec, ..Default::default() };
        self.call(name, "Exec", request)
    }

    fn update(&mut self, name: &str, resources: &Value) -> Result<()> {
        let resources = protobuf_any("LinuxResources", resources);
        self.call(name, "Update", api::UpdateTaskRequest { id: self.id.clone(), resources, ..Default::default() })
    }

    fn kill(&mut self, name: &str, exec: &str, signal: u32) -> Result<()> {
        let result = self.shim.task.kill(&self.id, exec, signal);
        self.note(name, result)
    }

    /// Every call that changes nothing in this state, whether it is rejected or not. Waits only if `ended`.
    fn everything(&mut self, state: &'static str, ended: bool) -> Result<()> {
        self.state = state;
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.state("State", "")?;
        self.note("Pids", task.pids(&id))?;
        self.note("Stats", task.stats(&id))?;
        self.call("Connect", "Connect", api::ConnectRequest { id: id.clone(), ..Default::default() })?;
        self.note("CloseIO", task.close_stdin(&id, ""))?;
        self.note("CloseIO again", task.close_stdin(&id, ""))?;
        self.note("CloseIO of an unknown exec", task.close_stdin(&id, "nothing"))?;
        self.state("State of an unknown exec", "nothing")?;
        self.note("Start of an unknown exec", task.start(&id, "nothing"))?;
        self.note("Wait for an unknown exec", task.wait(&id, "nothing"))?;
        self.note("Delete of an unknown exec", task.delete(&id, "nothing"))?;
        self.kill("Kill of an unknown exec", "nothing", 9)?;
        self.kill("Kill with an invalid signal", "", 65)?;
        self.update("Update with empty resources", &json!({}))?;
        if ended {
            self.note("Wait", task.wait(&id, ""))?;
        }
        Ok(())
    }

    /// Calls before Create.
    fn absent(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.everything("absent", true)?;
        self.note("Start", task.start(&id, ""))?;
        self.kill("Kill", "", 9)?;
        self.note("Delete", task.delete(&id, ""))?;
        self.note("Pause", task.pause(&id))?;
        self.note("Resume", task.resume(&id))?;
        self.exec("Exec", "one", &["true"])?;
        self.call("Checkpoint", "Checkpoint", api::CheckpointTaskRequest { id: id.clone(), ..Default::default() })?;
        Ok(())
    }

    /// Creates the container and makes the calls before Start.
    fn created(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.shim.create(&Streams::default())?;
        self.everything("created", false)?;
        self.note(
            "Create",
            task.call::<_, api::CreateTaskResponse>("Create", &self.shim.create_request(&Streams::default())),
        )?;
        self.note("Pause", task.pause(&id))?;
        self.note("Resume", task.resume(&id))?;
        self.exec("Exec", "early", &["true"])?;
        self.note("Start of an exec", task.start(&id, "early"))?;
        Ok(())
    }

    /// Starts the container and makes the calls on it while it runs.
    fn running(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        task.start(&id, "")?;
        self.everything("running", false)?;
        self.note(
            "Create",
            task.call::<_, api::CreateTaskResponse>("Create", &self.shim.create_request(&Streams::default())),
        )?;
        self.note("Start", task.start(&id, ""))?;
        self.note("Delete", task.delete(&id, ""))?;
        self.note("Resume", task.resume(&id))?;
        self.update("Update with an invalid value", &json!({"memory": {"limit": -5}}))?;
        self.exec("Exec", "one", &["sleep", "1000"])?;
        self.exec("Exec with a used id", "one", &["sleep", "1000"])?;
        Ok(())
    }

    /// Goes through the life of an exec, and of one that fails to start.
    fn exec_states(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.state = "unstarted exec";
        self.state("State", "one")?;
        self.kill("Kill", "one", 9)?;
        self.note("CloseIO", task.close_stdin(&id, "one"))?;
        self.note("Start", task.start(&id, "one"))?;
        self.state = "running exec";
        self.state("State", "one")?;
        self.note("Delete", task.delete(&id, "one"))?;
        self.kill("Kill with an invalid signal", "one", 65)?;
        self.kill("Kill", "one", 15)?;
        ensure!(task.wait(&id, "one")? == 143);
        self.state = "exited exec";
        self.state("State", "one")?;
        self.note("Start", task.start(&id, "one"))?;
        self.kill("Kill", "one", 9)?;
        self.note("CloseIO", task.close_stdin(&id, "one"))?;
        self.exec("Exec with its id", "one", &["true"])?;
        self.note("Wait", task.wait(&id, "one"))?;
        self.note("Delete", task.delete(&id, "one"))?;
        self.note("Delete again", task.delete(&id, "one"))?;
        self.exec("Exec with the freed id", "one", &["true"])?;
        self.note("Delete before Start", task.delete(&id, "one"))?;
        self.state = "exec of a missing command";
        self.exec("Exec", "absent", &["/no/such/command"])?;
        self.note("Start", task.start(&id, "absent"))?;
        self.state("State", "absent")?;
        self.kill("Kill", "absent", 9)?;
        self.note("Delete", task.delete(&id, "absent"))?;
        Ok(())
    }

    /// Pauses the container with further execs, and resumes it.
    fn paused(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.state = "running";
        self.exec("Exec of a second", "two", &["sleep", "1000"])?;
        self.exec("Exec of a third", "three", &["sleep", "1000"])?;
        self.exec("Exec of a fourth", "stays", &["sleep", "1000"])?;
        self.note("Start of the third", task.start(&id, "three"))?;
        self.note("Start of the fourth", task.start(&id, "stays"))?;
        self.note("Pause", task.pause(&id))?;
        self.everything("paused", false)?;
        self.note("Pause", task.pause(&id))?;
        self.note("Delete", task.delete(&id, ""))?;
        self.exec("Exec", "four", &["true"])?;
        self.note("Start of an exec", task.start(&id, "two"))?;
        self.state("State of an exec", "three")?;
        self.note("Delete of a running exec", task.delete(&id, "three"))?;
        self.kill("Kill of an exec", "three", 15)?;
        self.note("Resume", task.resume(&id))?;
        ensure!(task.wait(&id, "three")? == 143);
        Ok(())
    }

    /// Kills the container, makes the calls on the stopped one, and deletes it.
    fn stopped_and_deleted(&mut self) -> Result<()> {
        let (id, task) = (self.id.clone(), &self.shim.task);
        task.kill(&id, "", 9)?;
        ensure!(task.wait(&id, "")? == 137);
        self.everything("stopped", true)?;
        self.note("Start", task.start(&id, ""))?;
        self.kill("Kill", "", 9)?;
        self.note("Kill of all", task.kill_all(&id, 9))?;
        self.note("Pause", task.pause(&id))?;
        self.note("Resume", task.resume(&id))?;
        self.exec("Exec", "five", &["true"])?;
        self.state("State of an exec", "stays")?;
        self.kill("Kill of an exec", "stays", 9)?;
        self.note("Wait for an exec", task.wait(&id, "stays"))?;
        self.note("Delete of an exec", task.delete(&id, "stays"))?;
        self.note("Delete", task.delete(&id, ""))?;
        self.everything("deleted", true)?;
        self.note("Delete", task.delete(&id, ""))?;
        self.kill("Kill", "", 9)?;
        Ok(())
    }
}

fn protobuf_any(kind: &str, value: &Value) -> containerd_shim_protos::protobuf::MessageField<husk_tests::shim::Any> {
    let type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
    Some(husk_tests::shim::Any { type_url, value: value.to_string().into_bytes(), ..Default::default() }).into()
}

/// Makes every call in every state of a container's life, except two that crash runc's shim: a second Start of a
/// running exec, and an Update without resources.
fn life(containerd: &Containerd) -> Result<Results> {
    let id = containerd.id("codes");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let mut caller = Caller { shim: &shim, id, state: "", results: Results::default() };
    caller.absent()?;
    caller.created()?;
    caller.running()?;
    caller.exec_states()?;
    caller.paused()?;
    caller.stopped_and_deleted()?;
    Ok(caller.results)
}

/// A container that is killed or deleted without ever having been started.
fn never_started(containerd: &Containerd) -> Result<Results> {
    let mut results = Results::default();
    for (name, kills) in [("kill", true), ("delete", false)] {
        let id = containerd.id(name);
        let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
        shim.create(&Streams::default())?;
        let mut caller = Caller { shim: &shim, id: id.clone(), state: "never started", results: Results::default() };
        if kills {
            caller.kill("Kill", "", 9)?;
            ensure!(shim.task.wait(&id, "")? == 137);
            caller.note("Start after Kill", shim.task.start(&id, ""))?;
        }
        caller.note(if kills { "Delete after Kill" } else { "Delete" }, shim.task.delete(&id, ""))?;
        caller.state("State after Delete", "")?;
        results.extend(caller.results);
    }
    Ok(results)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn calls_return_the_codes_of_runcs_shim() -> Result<()> {
    let runc = Containerd::with(Setup { runtime: Some(Runtime::Runc), ..Setup::default() })?;
    let husk = Containerd::shared()?;
    let all = |containerd: &Containerd| -> Result<Results> {
        let mut results = life(containerd)?;
        results.extend(never_started(containerd)?);
        Ok(results)
    };
    let (runc, husk) = (all(&runc)?, all(husk)?);
    expect_same(&runc.codes, &husk.codes, MORE_SPECIFIC)?;
    let different: Vec<_> =
        DIFFERENT_STATES.iter().map(|(call, runc, husk)| (*call, runc.to_string(), husk.to_string())).collect();
    expect_same(&runc.states, &husk.states, &different)
}

/// Expects the same results for the same calls, except the listed differences, each of which must occur.
fn expect_same<T: Debug + PartialEq>(
    runc: &[(String, T)],
    husk: &[(String, T)],
    except: &[(&str, T, T)],
) -> Result<()> {
    let mut unexpected = Vec::new();
    let mut occurred = vec![false; except.len()];
    ensure!(runc.len() == husk.len(), "{runc:?}\n{husk:?}");
    for ((call, runc), (_, husk)) in runc.iter().zip(husk) {
        match except.iter().position(|(one, theirs, ours)| one == call && theirs == runc && ours == husk) {
            Some(listed) => occurred[listed] = true,
            None if runc != husk => unexpected.push(format!("(\"{call}\", {runc:?}, {husk:?}),")),
            None => {}
        }
    }
    ensure!(unexpected.is_empty(), "call, runc's result, husk's result:\n{}", unexpected.join("\n"));
    let missing: Vec<_> = except.iter().zip(occurred).filter(|(_, occurred)| !occurred).map(|(one, _)| one).collect();
    ensure!(missing.is_empty(), "differences that no longer occur: {missing:?}");
    Ok(())
}
