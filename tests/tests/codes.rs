//! Clients branch on the codes of answers: the same calls, in the same states, are answered by husk's shim as by containerd's own for runc.

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

/// Where husk says what runc's shim hides behind Unknown. By state and call, with runc's code and husk's.
const BETTER: &[(&str, Code, Code)] = &[
    ("created: CloseIO of no exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("created: Kill with no signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("created: Create", Code::UNKNOWN, Code::ALREADY_EXISTS),
    ("created: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("created: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: CloseIO of no exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("running: Kill with no signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("running: Create", Code::UNKNOWN, Code::ALREADY_EXISTS),
    ("running: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("running: Update of what is not possible", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("an exec that runs: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("an exec that runs: Kill with no signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("an exec that has ended: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("an exec of a command that is not there: Start", Code::UNKNOWN, Code::INTERNAL),
    ("paused: CloseIO of no exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("paused: Kill with no signal", Code::UNKNOWN, Code::INVALID_ARGUMENT),
    ("paused: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Delete", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Start of an exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("paused: Delete of an exec that runs", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: CloseIO of no exec", Code::UNKNOWN, Code::NOT_FOUND),
    ("stopped: Update of nothing", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Start", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Pause", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Resume", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("stopped: Exec", Code::UNKNOWN, Code::FAILED_PRECONDITION),
    ("never started: Start after the kill", Code::UNKNOWN, Code::FAILED_PRECONDITION),
];

/// Where State says something else than runc's shim: this one takes an exec that did not start for one that still may.
const OTHER: &[(&str, &str, &str)] = &[(
    "an exec of a command that is not there: State",
    "\"absent\" \"\" CREATED false 0 never",
    "\"absent\" \"\" STOPPED false 255 at a time",
)];

/// What each call was answered with, in the order of the calls; of State what it said, too.
#[derive(Default)]
struct Answers {
    codes: Vec<(String, Code)>,
    states: Vec<(String, String)>,
}

impl Answers {
    fn extend(&mut self, other: Self) {
        self.codes.extend(other.codes);
        self.states.extend(other.states);
    }
}

struct Caller<'a> {
    shim: &'a Shim<'a>,
    id: String,
    state: &'static str,
    answers: Answers,
}

fn code_of<T>(answer: ttrpc::Result<T>) -> Result<Code> {
    match answer {
        Ok(_) => Ok(Code::OK),
        Err(ttrpc::Error::RpcStatus(status)) => Ok(status.code()),
        Err(other) => Err(other).context("no answer with a code"),
    }
}

impl Caller<'_> {
    fn note<T>(&mut self, call: &str, answer: ttrpc::Result<T>) -> Result<()> {
        let code = code_of(answer).with_context(|| format!("{}: {call}", self.state))?;
        self.answers.codes.push((format!("{}: {call}", self.state), code));
        Ok(())
    }

    fn state(&mut self, call: &str, exec: &str) -> Result<()> {
        let answer = self.shim.task.state(&self.id, exec);
        if let Ok(state) = &answer {
            let ended = if state.exited_at.as_ref().is_some_and(|at| at.seconds > 0) { "at a time" } else { "never" };
            let who = state.id.replace(&self.id, "ID");
            let (status, pid) = (state.status.enum_value_or_default(), state.pid > 0);
            let said = format!("{who:?} {:?} {status:?} {pid} {} {ended}", state.exec_id, state.exit_status);
            self.answers.states.push((format!("{}: {call}", self.state), said));
        }
        self.note(call, answer)
    }

    fn call<Q: Message>(&mut self, name: &str, method: &str, request: Q) -> Result<()> {
        let answer = self.shim.task.call::<Q, api::Empty>(method, &request);
        self.note(name, answer)
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
        let answer = self.shim.task.kill(&self.id, exec, signal);
        self.note(name, answer)
    }

    /// Every call that changes nothing in `state`, whether it is refused there or not. Waits only where they end.
    fn everything(&mut self, state: &'static str, ended: bool) -> Result<()> {
        self.state = state;
        let (id, task) = (self.id.clone(), &self.shim.task);
        self.state("State", "")?;
        self.note("Pids", task.pids(&id))?;
        self.note("Stats", task.stats(&id))?;
        self.call("Connect", "Connect", api::ConnectRequest { id: id.clone(), ..Default::default() })?;
        self.note("CloseIO", task.close_stdin(&id, ""))?;
        self.note("CloseIO again", task.close_stdin(&id, ""))?;
        self.note("CloseIO of no exec", task.close_stdin(&id, "nothing"))?;
        self.state("State of no exec", "nothing")?;
        self.note("Start of no exec", task.start(&id, "nothing"))?;
        self.note("Wait for no exec", task.wait(&id, "nothing"))?;
        self.note("Delete of no exec", task.delete(&id, "nothing"))?;
        self.kill("Kill of no exec", "nothing", 9)?;
        self.kill("Kill with no signal", "", 65)?;
        self.update("Update of nothing", &json!({}))?;
        if ended {
            self.note("Wait", task.wait(&id, ""))?;
        }
        Ok(())
    }
}

fn protobuf_any(kind: &str, value: &Value) -> containerd_shim_protos::protobuf::MessageField<husk_tests::shim::Any> {
    let type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
    Some(husk_tests::shim::Any { type_url, value: value.to_string().into_bytes(), ..Default::default() }).into()
}

/// A container's life with every call in every state of it. But for two that runc's shim itself does not survive: a second Start of an exec
/// that runs, and an Update without resources.
fn life(containerd: &Containerd) -> Result<Answers> {
    let id = containerd.id("codes");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let task = &shim.task;
    let mut to = Caller { shim: &shim, id: id.clone(), state: "", answers: Answers::default() };

    to.everything("absent", true)?;
    to.note("Start", task.start(&id, ""))?;
    to.kill("Kill", "", 9)?;
    to.note("Delete", task.delete(&id, ""))?;
    to.note("Pause", task.pause(&id))?;
    to.note("Resume", task.resume(&id))?;
    to.exec("Exec", "one", &["true"])?;
    to.call("Checkpoint", "Checkpoint", api::CheckpointTaskRequest { id: id.clone(), ..Default::default() })?;

    shim.create(&Streams::default())?;
    to.everything("created", false)?;
    to.note("Create", task.call::<_, api::CreateTaskResponse>("Create", &shim.create_request(&Streams::default())))?;
    to.note("Pause", task.pause(&id))?;
    to.note("Resume", task.resume(&id))?;
    to.exec("Exec", "early", &["true"])?;
    to.note("Start of an exec", task.start(&id, "early"))?;

    task.start(&id, "")?;
    to.everything("running", false)?;
    to.note("Create", task.call::<_, api::CreateTaskResponse>("Create", &shim.create_request(&Streams::default())))?;
    to.note("Start", task.start(&id, ""))?;
    to.note("Delete", task.delete(&id, ""))?;
    to.note("Resume", task.resume(&id))?;
    to.update("Update of what is not possible", &json!({"memory": {"limit": -5}}))?;
    to.exec("Exec", "one", &["sleep", "1000"])?;
    to.exec("Exec of a taken id", "one", &["sleep", "1000"])?;

    to.state = "an exec that was not started";
    to.state("State", "one")?;
    to.kill("Kill", "one", 9)?;
    to.note("CloseIO", task.close_stdin(&id, "one"))?;
    to.note("Start", task.start(&id, "one"))?;
    to.state = "an exec that runs";
    to.state("State", "one")?;
    to.note("Delete", task.delete(&id, "one"))?;
    to.kill("Kill with no signal", "one", 65)?;
    to.kill("Kill", "one", 15)?;
    ensure!(task.wait(&id, "one")? == 143);
    to.state = "an exec that has ended";
    to.state("State", "one")?;
    to.note("Start", task.start(&id, "one"))?;
    to.kill("Kill", "one", 9)?;
    to.note("CloseIO", task.close_stdin(&id, "one"))?;
    to.exec("Exec of its id", "one", &["true"])?;
    to.note("Wait", task.wait(&id, "one"))?;
    to.note("Delete", task.delete(&id, "one"))?;
    to.note("Delete again", task.delete(&id, "one"))?;
    to.exec("Exec of its id, which is free", "one", &["true"])?;
    to.note("Delete before the start", task.delete(&id, "one"))?;
    to.state = "an exec of a command that is not there";
    to.exec("Exec", "absent", &["/no/such/command"])?;
    to.note("Start", task.start(&id, "absent"))?;
    to.state("State", "absent")?;
    to.kill("Kill", "absent", 9)?;
    to.note("Delete", task.delete(&id, "absent"))?;

    to.state = "running";
    to.exec("Exec of a second", "two", &["sleep", "1000"])?;
    to.exec("Exec of a third", "three", &["sleep", "1000"])?;
    to.exec("Exec of one that stays", "stays", &["sleep", "1000"])?;
    to.note("Start of the third", task.start(&id, "three"))?;
    to.note("Start of the one that stays", task.start(&id, "stays"))?;
    to.note("Pause", task.pause(&id))?;
    to.everything("paused", false)?;
    to.note("Pause", task.pause(&id))?;
    to.note("Delete", task.delete(&id, ""))?;
    to.exec("Exec", "four", &["true"])?;
    to.note("Start of an exec", task.start(&id, "two"))?;
    to.state("State of an exec", "three")?;
    to.note("Delete of an exec that runs", task.delete(&id, "three"))?;
    to.kill("Kill of an exec", "three", 15)?;
    to.note("Resume", task.resume(&id))?;
    ensure!(task.wait(&id, "three")? == 143);

    task.kill(&id, "", 9)?;
    ensure!(task.wait(&id, "")? == 137);
    to.everything("stopped", true)?;
    to.note("Start", task.start(&id, ""))?;
    to.kill("Kill", "", 9)?;
    to.note("Kill of all", task.kill_all(&id, 9))?;
    to.note("Pause", task.pause(&id))?;
    to.note("Resume", task.resume(&id))?;
    to.exec("Exec", "five", &["true"])?;
    to.state("State of an exec", "stays")?;
    to.kill("Kill of an exec", "stays", 9)?;
    to.note("Wait for an exec", task.wait(&id, "stays"))?;
    to.note("Delete of an exec", task.delete(&id, "stays"))?;
    to.note("Delete", task.delete(&id, ""))?;
    to.everything("deleted", true)?;
    to.note("Delete", task.delete(&id, ""))?;
    to.kill("Kill", "", 9)?;
    Ok(to.answers)
}

/// A container that is killed, and deleted, without ever having been started.
fn stillbirth(containerd: &Containerd) -> Result<Answers> {
    let mut answers = Answers::default();
    for (name, kills) in [("kill", true), ("delete", false)] {
        let id = containerd.id(name);
        let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
        shim.create(&Streams::default())?;
        let mut to = Caller { shim: &shim, id: id.clone(), state: "never started", answers: Answers::default() };
        if kills {
            to.kill("Kill", "", 9)?;
            ensure!(shim.task.wait(&id, "")? == 137);
            to.note("Start after the kill", shim.task.start(&id, ""))?;
        }
        to.note(if kills { "Delete after the kill" } else { "Delete" }, shim.task.delete(&id, ""))?;
        to.state("State after the delete", "")?;
        answers.extend(to.answers);
    }
    Ok(answers)
}

#[test]
fn calls_are_answered_with_runcs_codes() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("calls_are_answered_with_runcs_codes") {
        return Ok(());
    }
    let runc = Containerd::with(Setup { runtime: Some(Runtime::Runc), ..Setup::default() })?;
    let husk = Containerd::shared()?;
    let all = |containerd: &Containerd| -> Result<Answers> {
        let mut answers = life(containerd)?;
        answers.extend(stillbirth(containerd)?);
        Ok(answers)
    };
    let (theirs, ours) = (all(&runc)?, all(husk)?);
    expect_same(&theirs.codes, &ours.codes, BETTER)?;
    let other: Vec<_> = OTHER.iter().map(|(call, runc, husk)| (*call, runc.to_string(), husk.to_string())).collect();
    expect_same(&theirs.states, &ours.states, &other)
}

/// The same answers to the same calls, but for those that are listed; and all of these.
fn expect_same<T: Debug + PartialEq>(runc: &[(String, T)], husk: &[(String, T)], but: &[(&str, T, T)]) -> Result<()> {
    let mut unlike = Vec::new();
    let mut met = vec![false; but.len()];
    ensure!(runc.len() == husk.len(), "{runc:?}\n{husk:?}");
    for ((call, runc), (_, husk)) in runc.iter().zip(husk) {
        match but.iter().position(|(one, theirs, ours)| one == call && theirs == runc && ours == husk) {
            Some(listed) => met[listed] = true,
            None if runc != husk => unlike.push(format!("(\"{call}\", {runc:?}, {husk:?}),")),
            None => {}
        }
    }
    ensure!(unlike.is_empty(), "call, runc's answer, husk's:\n{}", unlike.join("\n"));
    let gone: Vec<_> = but.iter().zip(met).filter(|(_, met)| !met).map(|(one, _)| one).collect();
    ensure!(gone.is_empty(), "these are not so any more: {gone:?}");
    Ok(())
}
