//! The core of the guest, below the shim: the init and its containers, driven over vsock.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::{ExecProcessRequest, KillRequest, StateRequest, Status};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExit};
use husk_protos::events::SubscribeRequest;
use husk_protos::events_ttrpc::EventsClient;
use husk_protos::protobuf::Message;
use husk_protos::protobuf::well_known_types::any::Any;
use husk_protos::stdio::{StreamKind, StreamRequest};
use husk_protos::stdio_ttrpc::StdioClient;
use husk_protos::system::{InfoRequest, InfoResponse};
use husk_protos::system_ttrpc::SystemClient;
use husk_protos::{PORT_EVENTS, PORT_RELAY, PORT_STDIO, PORT_STREAMS, PORT_TASK, SECRET};
use husk_tests::guest::{Guest, STEP, call, spec};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use ttrpc::{Code, context};

const CONTAINERS: u32 = 200;

fn code<T: std::fmt::Debug>(result: Result<T>) -> Result<(Code, String)> {
    match result.map_err(|error| error.downcast()) {
        Err(Ok(ttrpc::Error::RpcStatus(status))) => Ok((status.code(), status.message)),
        other => bail!("no error with a status: {other:?}"),
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

/// Waits until the guest has as many descriptors, processes, zombies and cgroups as `before`: the last worker may still
/// be exiting after its call has returned.
async fn nothing_leaked(guest: &Guest, before: &InfoResponse) -> Result<()> {
    let counts = |info: &InfoResponse| (info.init_open_fds, info.processes, info.zombies, info.container_cgroups);
    let began = Instant::now();
    loop {
        let after = guest.info().await?;
        if counts(&after) == counts(before) {
            return Ok(());
        }
        ensure!(began.elapsed() < STEP, "before: {before}\nafter: {after}");
    }
}

#[tokio::test]
async fn exit_statuses_of_200_concurrent_containers_are_all_reported() -> Result<()> {
    let guest = Guest::boot().await?;
    // Initialises whatever is created once and kept.
    ensure!(guest.run("first", &spec(&["sh", "-c", "exit 7"])).await?.0 == 7);
    let before = guest.info().await?;

    let began = Instant::now();
    // The guest rejects a Create that waits for 25 s for others to end.
    let creating = Semaphore::new(16);
    let one = async |number: u32| -> Result<()> {
        let id = format!("c{number}");
        let turn = creating.acquire().await?;
        guest.create(&id, &spec(&["sh", "-c", &format!("exit {number}")]), "").await?;
        drop(turn);
        let (waited, _) = tokio::try_join!(guest.wait(&id, ""), guest.start(&id, ""))?;
        ensure!(waited == number, "wait returned {waited}");
        let deleted = guest.delete(&id, "").await?.exit_status;
        ensure!(deleted == number, "delete returned {deleted}");
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
async fn a_thousand_simultaneous_stream_connections_are_accepted() -> Result<()> {
    let guest = Guest::boot().await?;
    // As hundreds of processes starting together would do. None is accepted before all have connected, because the
    // guest has one CPU.
    let connections = (0..1000).map(|_| guest.device.connect(PORT_STDIO, Duration::from_secs(30)));
    let connected = futures::future::join_all(connections).await;
    let failed = connected.iter().filter_map(|connected| connected.as_ref().err()).collect::<Vec<_>>();
    ensure!(failed.is_empty(), "{} connections failed: {}", failed.len(), failed[0]);
    Ok(())
}

#[tokio::test]
async fn a_connection_that_does_not_begin_with_the_vms_secret_is_closed_and_delays_no_other() -> Result<()> {
    let guest = Guest::boot().await?;
    ensure!(guest.hello.secret.len() == SECRET, "{} bytes", guest.hello.secret.len());
    let mut wrong = guest.hello.secret.clone();
    wrong[0] ^= 1;
    for port in [PORT_TASK, PORT_STDIO, PORT_STREAMS, PORT_EVENTS, PORT_RELAY] {
        let silent = guest.device.connect(port, STEP).await?;
        let mut guess = guest.device.connect(port, STEP).await?;
        guess.write_all(&wrong).await?;
        let answered = timeout(STEP, guess.read_u8()).await.with_context(|| format!("port {port} stays open"))?;
        ensure!(answered.is_err(), "port {port} answers");
        drop(silent);
    }
    // The guest does not repeat its secret.
    ensure!(guest.info().await?.hello.secret.is_empty(), "Info returns the secret");
    let _silent = guest.device.connect(PORT_TASK, STEP).await?;
    SystemClient::new(guest.connect(PORT_TASK).await?).info(call(), &InfoRequest::new()).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn stdio_passes_unchanged_and_the_exit_mark_follows_the_output() -> Result<()> {
    let guest = Guest::boot().await?;
    let input: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    guest.create("cat", &spec(&["cat"]), "io").await?;
    // Both streams wait for their process, and the process waits for its start.
    let (written, output, _) =
        tokio::try_join!(guest.input("cat", "", &input), guest.output("cat", "", false), guest.start("cat", ""))?;
    ensure!(written == input.len() as u64, "{written} bytes written");
    ensure!(output == input, "{} bytes received", output.len());
    ensure!(guest.wait("cat", "").await? == 0);
    guest.delete("cat", "").await?;

    // The shell exits, but its child keeps the pipe open. The mark comes at once, then the child's output, and the end
    // of the stream when the child exits.
    guest.create("mark", &spec(&["sleep", "1000"]), "").await?;
    guest.start("mark", "").await?;
    exec(&guest, "mark", "e", &["sh", "-c", "(sleep 2; echo late) & head -c 100000 /dev/zero; echo early"], "o")
        .await?;
    let request = StreamRequest {
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
    // Each stream has one reader at a time.
    let second = StdioClient::new(guest.connect(PORT_STDIO).await?);
    let mut second_reader = second.output(context::with_timeout(0), &request).await?;
    ensure!(code(second_reader.recv().await.map_err(Into::into))?.0 == Code::ALREADY_EXISTS);
    loop {
        let chunk = timeout(STEP, stream.recv()).await??.context("the stream ended without an exit mark")?;
        if chunk.exited {
            break;
        }
        before.extend(chunk.data);
    }
    ensure!(before.len() == 100_006 && before.ends_with(b"early\n"), "{} bytes before the exit mark", before.len());
    guest.delete("mark", "e").await?;
    let late = timeout(STEP, stream.recv()).await??.context("nothing after the exit mark")?;
    ensure!(late.data == b"late\n" && !late.exited, "{late}");
    ensure!(timeout(STEP, stream.recv()).await??.is_none());
    kill(&guest, "mark", "", libc::SIGKILL, false).await?;
    guest.wait("mark", "").await?;
    guest.delete("mark", "").await?;

    // A process that never reads: the response contains the bytes taken, and nothing hangs.
    guest.create("unread", &spec(&["true"]), "i").await?;
    let (written, _) = tokio::try_join!(guest.input("unread", "", &input), guest.start("unread", ""))?;
    ensure!(written < input.len() as u64);
    guest.delete("unread", "").await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn execs_run_beside_the_init_and_their_exits_are_reported_first() -> Result<()> {
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

    // The init's exit ends its execs, and is reported after theirs.
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
    let mut events = Vec::new();
    while events.last().is_none_or(|(topic, _)| topic != "/tasks/delete") {
        if events.len() % 10 == 9 {
            // The previous subscription ends with its connection. No event may be lost or repeated.
            stream = subscribe(events.len() as u64).await?;
        }
        let event = timeout(STEP, stream.recv()).await??.context("the events ended")?;
        ensure!(event.sequence == events.len() as u64 + 1, "{event}");
        let id = match event.topic.as_str() {
            "/tasks/exit" => TaskExit::parse_from_bytes(&event.event.value)?.id,
            "/tasks/exec-added" => TaskExecAdded::parse_from_bytes(&event.event.value)?.exec_id,
            _ => String::new(),
        };
        events.push((event.topic, id));
    }
    let count = |expected: &str| events.iter().filter(|(topic, _)| topic == expected).count();
    ensure!((count("/tasks/create"), count("/tasks/start"), count("/tasks/exec-added")) == (1, 1, 24), "{events:?}");
    ensure!((count("/tasks/exec-started"), count("/tasks/exit")) == (22, 23), "{events:?}");
    let exits: Vec<&str> =
        events.iter().filter(|(topic, _)| topic == "/tasks/exit").map(|(_, id)| id.as_str()).collect();
    ensure!(exits.ends_with(&["last", "c"]), "{exits:?}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn rejected_specs_are_named_in_the_error_and_leave_nothing_behind() -> Result<()> {
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
    for (pointer, value, expected, names) in cases {
        let (code, message) = code(guest.create("bad", &changed(pointer, value), "oe").await).context(pointer)?;
        ensure!(code == expected && message.contains(names), "{pointer}: {code:?} {message}");
        let remove = husk_protos::bundle::RemoveBundleRequest { id: "bad".into(), ..Default::default() };
        guest.bundle.remove(call(), &remove).await?;
        nothing_leaked(&guest, &before).await.context(pointer)?;
    }
    ensure!(guest.run("bad", &spec(&["true"])).await?.0 == 0, "the id cannot be used again");
    nothing_leaked(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_hanging_create_fails_at_its_deadline_and_leaves_nothing_behind() -> Result<()> {
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
async fn hooks_run_in_order_and_a_hanging_hook_fails_at_its_deadline() -> Result<()> {
    let guest = Guest::boot().await?;
    let mut hooked = spec(&["sh", "-c", "until grep -q running /tmp/states; do :; done; cat /tmp/states"]);
    hooked["root"]["readonly"] = json!(false);
    // The first path is in the container's root, the second in the guest's.
    let hook = |path: &str, script: &str| json!({"path": path, "args": ["sh", "-c", script], "env": ["PATH=/bin"]});
    let (first, second) = ("sleep 1; echo first > /tmp/states", "/rootfs/bin/busybox cat >> /rootfs/tmp/states");
    hooked["hooks"] = json!({
        "startContainer": [hook("/bin/sh", first)],
        "poststart": [hook("/rootfs/bin/busybox", second)],
        "poststop": [hook("/rootfs/bin/busybox", "echo last > /rootfs/tmp/states")],
    });
    let (status, output) = guest.run("c", &hooked).await?;
    let state: Value = serde_json::from_str(output.strip_prefix("first\n").with_context(|| output.clone())?)?;
    ensure!(status == 0 && state["status"] == json!("running") && state["pid"].as_u64() > Some(1), "{status} {state}");

    ensure!(guest.run("c", &spec(&["cat", "/tmp/states"])).await? == (0, "last\n".to_owned()));

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
async fn calls_return_codes_for_the_state_of_the_process() -> Result<()> {
    let guest = Guest::boot().await?;
    let missing = [
        code(guest.start("absent", "").await)?,
        code(guest.wait("absent", "").await)?,
        code(guest.delete("absent", "").await)?,
        code(kill(&guest, "absent", "", 9, false).await)?,
        code(status(&guest, "absent", "").await)?,
        code(exec(&guest, "absent", "e", &["true"], "").await)?,
    ];
    ensure!(missing.iter().all(|(code, _)| *code == Code::NOT_FOUND), "{missing:?}");

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
    ensure!(
        guest.delete("never", "").await?.exit_status == 137,
        "a container that was never started cannot be deleted"
    );

    let request = containerd_shim_protos::api::CheckpointTaskRequest::new();
    ensure!(code(guest.task.checkpoint(call(), &request).await.map_err(Into::into))?.0 == Code::UNIMPLEMENTED);
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_shutdown_stops_running_containers_and_ends_the_vm() -> Result<()> {
    let guest = Guest::boot().await?;
    for (id, trap) in [("ignores-term", "trap '' TERM"), ("handles-term", "trap 'exit 3' TERM")] {
        let script = format!("{trap}; echo set; sleep 1000 & wait; wait");
        guest.create(id, &spec(&["sh", "-c", &script]), "o").await?;
        let request = StreamRequest {
            container_id: id.into(),
            kind: StreamKind::STREAM_KIND_STDOUT.into(),
            ..Default::default()
        };
        let client = StdioClient::new(guest.connect(PORT_STDIO).await?);
        let mut stream = client.output(context::with_timeout(0), &request).await?;
        guest.start(id, "").await?;
        timeout(STEP, stream.recv()).await??.context("no output")?;
    }
    let handler = guest.task.clone();
    let waited = tokio::spawn(async move {
        let request = containerd_shim_protos::api::WaitRequest { id: "handles-term".into(), ..Default::default() };
        handler.wait(call(), &request).await.map(|response| response.exit_status)
    });
    // A paused container receives the signal as well.
    let request = containerd_shim_protos::api::PauseRequest { id: "handles-term".into(), ..Default::default() };
    guest.task.pause(call(), &request).await?;
    ensure!(status(&guest, "handles-term", "").await? == Status::PAUSED);
    let began = Instant::now();
    let mut end = [0];
    let mut guest = guest;
    let mut ready = std::mem::replace(&mut guest.ready, tokio::net::UnixStream::pair()?.0);
    let console = guest.shut_down().await?;
    eprintln!("ended after {:?}\n{console}", began.elapsed());
    ensure!(ready.read(&mut end).await? == 0, "the ready connection must end with the guest");
    ensure!(began.elapsed() > Duration::from_secs(3), "the container that ignores SIGTERM got no grace period");
    ensure!(waited.await?? == 3, "the container that handles SIGTERM did not exit by itself");
    Ok(())
}
