//! The guest's core, below the shim: the init and its containers, driven over vsock.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::{ExecProcessRequest, KillRequest, StateRequest, Status};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExit};
use husk_protos::events::SubscribeRequest;
use husk_protos::events_ttrpc::EventsClient;
use husk_protos::protobuf::Message;
use husk_protos::protobuf::well_known_types::any::Any;
use husk_protos::stdio::{OutputRequest, StreamKind};
use husk_protos::stdio_ttrpc::StdioClient;
use husk_protos::system::InfoResponse;
use husk_protos::{PORT_EVENTS, PORT_STDIO};
use husk_tests::guest::{Guest, STEP, call, spec};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use ttrpc::{Code, context};

const CONTAINERS: u32 = 200;

fn code<T: std::fmt::Debug>(result: Result<T>) -> Result<(Code, String)> {
    match result.map_err(|error| error.downcast()) {
        Err(Ok(ttrpc::Error::RpcStatus(status))) => Ok((status.code(), status.message)),
        other => bail!("not an answer with a status: {other:?}"),
    }
}

async fn exec(guest: &Guest, id: &str, exec: &str, args: &[&str], streams: &str) -> Result<()> {
    let process = spec(args)["process"].take();
    let stream = |letter| if streams.contains(letter) { "stream".to_owned() } else { String::new() };
    let request = ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        spec: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process)?,
            ..Default::default()
        })
        .into(),
        stdin: stream('i'),
        stdout: stream('o'),
        stderr: stream('e'),
        ..Default::default()
    };
    guest.task.exec(call(), &request).await?;
    Ok(())
}

async fn kill(guest: &Guest, id: &str, exec: &str, signal: i32, all: bool) -> Result<()> {
    let request = KillRequest { id: id.into(), exec_id: exec.into(), signal: signal as u32, all, ..Default::default() };
    guest.task.kill(call(), &request).await?;
    Ok(())
}

async fn status(guest: &Guest, id: &str, exec: &str) -> Result<Status> {
    let request = StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
    guest.task.state(call(), &request).await?.status.enum_value().map_err(|unknown| anyhow::anyhow!("status {unknown}"))
}

/// Waits until the guest has as many descriptors, processes, zombies and cgroups as `before`: the last worker may still be ending when its
/// call is answered.
async fn nothing_leaked(guest: &Guest, before: &InfoResponse) -> Result<()> {
    let counts = |info: &InfoResponse| (info.init_open_fds, info.processes, info.zombies, info.container_cgroups);
    let began = Instant::now();
    loop {
        let after = guest.info().await?;
        if counts(&after) == counts(before) {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_secs(10), "before: {before}\nafter: {after}");
    }
}

#[tokio::test]
async fn two_hundred_containers_that_exit_at_once_are_all_accounted_for() -> Result<()> {
    let guest = Guest::boot().await?;
    // Whatever is made once and kept is there before the count.
    ensure!(guest.run("first", &spec(&["sh", "-c", "exit 7"])).await?.0 == 7);
    let before = guest.info().await?;

    let began = Instant::now();
    let one = async |number: u32| -> Result<()> {
        let id = format!("c{number}");
        guest.create(&id, &spec(&["sh", "-c", &format!("exit {number}")]), "").await?;
        let (waited, _) = tokio::try_join!(guest.wait(&id, ""), guest.start(&id, ""))?;
        ensure!(waited == number, "wait says {waited}");
        let deleted = guest.delete(&id, "").await?.exit_status;
        ensure!(deleted == number, "delete says {deleted}");
        Ok(())
    };
    let all = (0..CONTAINERS).map(|number| {
        let one = &one;
        async move { one(number).await.with_context(|| format!("container {number}")) }
    });
    futures::future::try_join_all(all).await.with_context(|| guest.vm.console())?;
    eprintln!("{CONTAINERS} containers in {:?}", began.elapsed());
    nothing_leaked(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_thousand_streams_that_are_asked_for_at_once_all_find_room() -> Result<()> {
    let guest = Guest::boot().await?;
    // As by hundreds of processes that are started together: none can be accepted before all have asked, as the guest has one processor.
    let asked = (0..1000).map(|_| guest.device.connect(PORT_STDIO, Duration::from_secs(30)));
    let refused = futures::future::join_all(asked).await.into_iter().filter_map(Result::err).collect::<Vec<_>>();
    ensure!(refused.is_empty(), "{} of them: {}", refused.len(), refused[0]);
    Ok(())
}

#[tokio::test]
async fn what_goes_in_comes_out_and_the_exit_is_marked_behind_it() -> Result<()> {
    let guest = Guest::boot().await?;
    let input: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    guest.create("cat", &spec(&["cat"]), "io").await?;
    // Both streams wait for their process, and the process for its start.
    let (written, output, _) =
        tokio::try_join!(guest.input("cat", "", &input), guest.output("cat", "", false), guest.start("cat", ""))?;
    ensure!(written == input.len() as u64, "{written} bytes were written");
    ensure!(output == input, "{} bytes came out", output.len());
    ensure!(guest.wait("cat", "").await? == 0);
    guest.delete("cat", "").await?;

    // The shell ends, what it started keeps the pipe: the mark comes at once, the rest of the output behind it, and the end when the last
    // has gone.
    guest.create("mark", &spec(&["sleep", "1000"]), "").await?;
    guest.start("mark", "").await?;
    exec(&guest, "mark", "e", &["sh", "-c", "(sleep 2; echo late) & head -c 100000 /dev/zero; echo early"], "o")
        .await?;
    let request = OutputRequest {
        container_id: "mark".into(),
        exec_id: "e".into(),
        kind: StreamKind::STREAM_KIND_STDOUT.into(),
        ..Default::default()
    };
    let client = StdioClient::new(guest.connect(PORT_STDIO).await?);
    let mut stream = client.output(context::with_timeout(0), &request).await?;
    guest.start("mark", "e").await?;
    let mut before = Vec::new();
    before.extend(timeout(STEP, stream.recv()).await??.context("no output")?.data);
    // One reader at a time.
    let second = StdioClient::new(guest.connect(PORT_STDIO).await?);
    let mut refused = second.output(context::with_timeout(0), &request).await?;
    ensure!(code(refused.recv().await.map_err(Into::into))?.0 == Code::ALREADY_EXISTS);
    loop {
        let chunk = timeout(STEP, stream.recv()).await??.context("the stream ended without a mark")?;
        if chunk.exited {
            break;
        }
        before.extend(chunk.data);
    }
    ensure!(before.len() == 100_006 && before.ends_with(b"early\n"), "{} bytes before the mark", before.len());
    guest.delete("mark", "e").await?;
    let late = timeout(STEP, stream.recv()).await??.context("nothing behind the mark")?;
    ensure!(late.data == b"late\n" && !late.exited, "{late}");
    ensure!(timeout(STEP, stream.recv()).await??.is_none());
    kill(&guest, "mark", "", libc::SIGKILL, false).await?;
    guest.wait("mark", "").await?;
    guest.delete("mark", "").await?;

    // A process that never reads: what was not taken is told, and nothing hangs.
    guest.create("deaf", &spec(&["true"]), "i").await?;
    let (written, _) = tokio::try_join!(guest.input("deaf", "", &input), guest.start("deaf", ""))?;
    ensure!(written < input.len() as u64);
    guest.delete("deaf", "").await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn execs_run_beside_the_init_and_are_told_of_before_it() -> Result<()> {
    let guest = Guest::boot().await?;
    guest.create("c", &spec(&["sleep", "1000"]), "").await?;
    exec(&guest, "c", "early", &["true"], "").await?;
    guest.start("c", "early").await.context("an exec before the init's start")?;
    ensure!(guest.wait("c", "early").await? == 0);
    guest.start("c", "").await?;
    ensure!(guest.delete("c", "early").await?.pid != 0);
    exec(&guest, "c", "never", &["true"], "").await?;
    ensure!(guest.delete("c", "never").await?.pid == 0);
    let before = guest.info().await?;

    let one = async |number: u32| -> Result<()> {
        let id = format!("e{number}");
        exec(&guest, "c", &id, &["sh", "-c", &format!("echo {number}; exit {number}")], "o").await?;
        ensure!(status(&guest, "c", &id).await? == Status::CREATED);
        let (output, waited, _) =
            tokio::try_join!(guest.output("c", &id, false), guest.wait("c", &id), guest.start("c", &id))?;
        ensure!((waited, output) == (number, format!("{number}\n").into_bytes()), "exec {number}");
        ensure!(guest.delete("c", &id).await?.exit_status == number);
        Ok(())
    };
    futures::future::try_join_all((0..20).map(one)).await?;

    exec(&guest, "c", "e", &["absent"], "").await?;
    ensure!(code(exec(&guest, "c", "e", &["true"], "").await)?.0 == Code::ALREADY_EXISTS);
    let (_, message) = code(guest.start("c", "e").await)?;
    ensure!(message.contains("exec: \"absent\": executable file not found in $PATH"), "{message}");
    guest.wait("c", "e").await?;
    guest.delete("c", "e").await?;
    nothing_leaked(&guest, &before).await?;

    // The init's end takes its execs along, and comes after theirs.
    exec(&guest, "c", "last", &["sleep", "1000"], "").await?;
    guest.start("c", "last").await?;
    kill(&guest, "c", "", libc::SIGKILL, false).await?;
    ensure!((guest.wait("c", "").await?, guest.wait("c", "last").await?) == (137, 137));
    guest.delete("c", "last").await?;
    guest.delete("c", "").await?;

    let subscribe = async |after: u64| -> Result<_> {
        let events = EventsClient::new(guest.connect(PORT_EVENTS).await?);
        let request = SubscribeRequest { after, ..Default::default() };
        Ok(events.subscribe(context::with_timeout(0), &request).await?)
    };
    let mut stream = subscribe(0).await?;
    let mut told = Vec::new();
    while told.last().is_none_or(|(topic, _)| topic != "/tasks/delete") {
        if told.len() % 10 == 9 {
            // The one before goes with its connection; nothing is lost, and nothing comes twice.
            stream = subscribe(told.len() as u64).await?;
        }
        let event = timeout(STEP, stream.recv()).await??.context("the events ended")?;
        ensure!(event.sequence == told.len() as u64 + 1, "{event}");
        let id = match event.topic.as_str() {
            "/tasks/exit" => TaskExit::parse_from_bytes(&event.event.value)?.id,
            "/tasks/exec-added" => TaskExecAdded::parse_from_bytes(&event.event.value)?.exec_id,
            _ => String::new(),
        };
        told.push((event.topic, id));
    }
    let of = |wanted: &str| told.iter().filter(|(topic, _)| topic == wanted).count();
    ensure!((of("/tasks/create"), of("/tasks/start"), of("/tasks/exec-added")) == (1, 1, 24), "{told:?}");
    ensure!((of("/tasks/exec-started"), of("/tasks/exit")) == (22, 23), "{told:?}");
    let exits: Vec<&str> = told.iter().filter(|(topic, _)| topic == "/tasks/exit").map(|(_, id)| id.as_str()).collect();
    ensure!(exits.ends_with(&["last", "c"]), "{exits:?}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn what_is_refused_is_named_and_leaves_nothing() -> Result<()> {
    let guest = Guest::boot().await?;
    ensure!(guest.run("first", &spec(&["true"])).await?.0 == 0);
    let before = guest.info().await?;

    let changed = |pointer: &str, value: Value| {
        let mut spec = spec(&["true"]);
        let (parent, name) = pointer.rsplit_once('/').unwrap_or_default();
        if let Some(parent) = spec.pointer_mut(parent) {
            parent[name] = value;
        }
        spec
    };
    let devices = (0..3000).map(|major| json!({"allow": true, "type": "c", "major": major, "minor": 1, "access": "r"}));
    let cases = [
        (
            "/linux/resources/devices",
            devices.collect(),
            Code::INVALID_ARGUMENT,
            "linux.resources.devices: 3011 rules are more",
        ),
        ("/linux/intelRdt", json!({"closID": "x"}), Code::INVALID_ARGUMENT, "linux.intelRdt"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_VAX"]}),
            Code::INVALID_ARGUMENT,
            "SCMP_ARCH_VAX",
        ),
        ("/process/args", json!(["absent"]), Code::INTERNAL, "exec: \"absent\": executable file not found in $PATH"),
        ("/root/path", json!("/nowhere"), Code::INVALID_ARGUMENT, "root.path: /nowhere: No such file or directory"),
        ("/process/cwd", json!("/proc/absent"), Code::INTERNAL, "ENOENT"),
        ("/linux/resources/unified", json!({"memory.absent": "1"}), Code::INTERNAL, "memory.absent"),
    ];
    for (pointer, value, wanted, names) in cases {
        let (code, message) = code(guest.create("bad", &changed(pointer, value), "oe").await).context(pointer)?;
        ensure!(code == wanted && message.contains(names), "{pointer}: {code:?} {message}");
        let remove = husk_protos::bundle::RemoveBundleRequest { id: "bad".into(), ..Default::default() };
        guest.bundle.remove(call(), &remove).await?;
        nothing_leaked(&guest, &before).await.context(pointer)?;
    }
    ensure!(guest.run("bad", &spec(&["true"])).await?.0 == 0, "the id is free again");
    nothing_leaked(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_create_that_hangs_is_ended_by_its_deadline_and_leaves_nothing() -> Result<()> {
    let guest = Guest::boot().await?;
    ensure!(guest.run("first", &spec(&["true"])).await?.0 == 0);
    let before = guest.info().await?;
    let mut hangs = spec(&["true"]);
    hangs["hooks"] = json!({"createRuntime": [{"path": "/rootfs/bin/busybox", "args": ["sleep", "1000"]}]});
    let (code, message) = code(guest.create("c", &hangs, "oe").await)?;
    ensure!(code == Code::DEADLINE_EXCEEDED, "{code:?} {message}");
    let remove = husk_protos::bundle::RemoveBundleRequest { id: "c".into(), ..Default::default() };
    guest.bundle.remove(call(), &remove).await?;
    nothing_leaked(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn hooks_run_in_order_and_one_that_hangs_is_ended_by_its_deadline() -> Result<()> {
    let guest = Guest::boot().await?;
    let mut hooked = spec(&["sh", "-c", "until grep -q running /tmp/told; do :; done; cat /tmp/told"]);
    hooked["root"]["readonly"] = json!(false);
    // The one in the container's root, the other in the guest's.
    let hook = |path: &str, script: &str| json!({"path": path, "args": ["sh", "-c", script], "env": ["PATH=/bin"]});
    let (first, second) = ("sleep 1; echo first > /tmp/told", "/rootfs/bin/busybox cat >> /rootfs/tmp/told");
    hooked["hooks"] = json!({
        "startContainer": [hook("/bin/sh", first)],
        "poststart": [hook("/rootfs/bin/busybox", second)],
        "poststop": [hook("/rootfs/bin/busybox", "echo last > /rootfs/tmp/told")],
    });
    let (status, told) = guest.run("c", &hooked).await?;
    let state: Value = serde_json::from_str(told.strip_prefix("first\n").with_context(|| told.clone())?)?;
    ensure!(status == 0 && state["status"] == json!("running") && state["pid"].as_u64() > Some(1), "{status} {state}");

    ensure!(guest.run("c", &spec(&["cat", "/tmp/told"])).await? == (0, "last\n".to_owned()));

    let before = guest.info().await?;
    hooked["hooks"] = json!({"startContainer": [hook("/bin/sh", "sleep 1000")]});
    guest.create("c", &hooked, "").await?;
    let (code, message) = code(guest.start("c", "").await)?;
    ensure!(code == Code::DEADLINE_EXCEEDED, "{code:?} {message}");
    ensure!(guest.wait("c", "").await? == 137);
    guest.delete("c", "").await?;
    nothing_leaked(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn calls_answer_by_the_state_of_the_process() -> Result<()> {
    let guest = Guest::boot().await?;
    let not_there = [
        code(guest.start("absent", "").await)?,
        code(guest.wait("absent", "").await)?,
        code(guest.delete("absent", "").await)?,
        code(kill(&guest, "absent", "", 9, false).await)?,
        code(status(&guest, "absent", "").await)?,
        code(exec(&guest, "absent", "e", &["true"], "").await)?,
    ];
    ensure!(not_there.iter().all(|(code, _)| *code == Code::NOT_FOUND), "{not_there:?}");

    guest.create("c", &spec(&["sleep", "1000"]), "").await?;
    ensure!(status(&guest, "c", "").await? == Status::CREATED);
    ensure!(code(guest.wait("c", "absent").await)?.0 == Code::NOT_FOUND);
    guest.start("c", "").await?;
    ensure!(status(&guest, "c", "").await? == Status::RUNNING);
    ensure!(code(guest.start("c", "").await)?.0 == Code::FAILED_PRECONDITION);
    ensure!(code(guest.delete("c", "").await)?.0 == Code::FAILED_PRECONDITION);
    ensure!(code(kill(&guest, "c", "", 65, false).await)?.0 == Code::INVALID_ARGUMENT);
    let died = tokio::try_join!(guest.wait("c", ""), kill(&guest, "c", "", libc::SIGKILL, true))?.0;
    ensure!((died, guest.wait("c", "").await?) == (137, 137), "{died}");
    ensure!(status(&guest, "c", "").await? == Status::STOPPED);
    ensure!(code(kill(&guest, "c", "", 9, false).await)?.0 == Code::NOT_FOUND);
    ensure!(code(guest.start("c", "").await)?.0 == Code::FAILED_PRECONDITION);
    ensure!(code(exec(&guest, "c", "e", &["true"], "").await)?.0 == Code::FAILED_PRECONDITION);
    ensure!(guest.delete("c", "").await?.exit_status == 137);
    ensure!(code(guest.delete("c", "").await)?.0 == Code::NOT_FOUND);

    guest.create("never", &spec(&["true"]), "").await?;
    ensure!(code(guest.create("never", &spec(&["true"]), "").await)?.0 == Code::ALREADY_EXISTS);
    ensure!(guest.delete("never", "").await?.exit_status == 137, "a container that was never started can be deleted");

    let request = containerd_shim_protos::api::CheckpointTaskRequest::new();
    ensure!(code(guest.task.checkpoint(call(), &request).await.map_err(Into::into))?.0 == Code::UNIMPLEMENTED);
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_shutdown_stops_what_runs_and_ends_the_vm() -> Result<()> {
    let guest = Guest::boot().await?;
    for (id, trap) in [("deaf", "trap '' TERM"), ("polite", "trap 'exit 3' TERM")] {
        let script = format!("{trap}; echo set; sleep 1000 & wait; wait");
        guest.create(id, &spec(&["sh", "-c", &script]), "o").await?;
        let request = OutputRequest {
            container_id: id.into(),
            kind: StreamKind::STREAM_KIND_STDOUT.into(),
            ..Default::default()
        };
        let client = StdioClient::new(guest.connect(PORT_STDIO).await?);
        let mut stream = client.output(context::with_timeout(0), &request).await?;
        guest.start(id, "").await?;
        timeout(STEP, stream.recv()).await??.context("no output")?;
    }
    let polite = guest.task.clone();
    let waited = tokio::spawn(async move {
        let request = containerd_shim_protos::api::WaitRequest { id: "polite".into(), ..Default::default() };
        polite.wait(call(), &request).await.map(|answer| answer.exit_status)
    });
    // One that is paused hears of it as well.
    let request = containerd_shim_protos::api::PauseRequest { id: "polite".into(), ..Default::default() };
    guest.task.pause(call(), &request).await?;
    ensure!(status(&guest, "polite", "").await? == Status::PAUSED);
    let began = Instant::now();
    let mut end = [0];
    let mut guest = guest;
    let mut ready = std::mem::replace(&mut guest.ready, tokio::net::UnixStream::pair()?.0);
    let console = guest.shut_down().await?;
    eprintln!("ended after {:?}\n{console}", began.elapsed());
    ensure!(ready.read(&mut end).await? == 0, "the ready connection's end tells of the guest's");
    ensure!(began.elapsed() > Duration::from_secs(3), "the deaf one has its time");
    ensure!(waited.await?? == 3, "the polite one said so itself");
    Ok(())
}
