//! Order and time of a container's published events, with stalled readers. The clock stands still while any task can
//! run.

use std::time::Duration;

use protobuf::Message;
use tokio::time::Instant;

use super::*;
use crate::containerd::publisher::Kept;
use crate::rootfs::plan::RootKind;
use crate::stdio::Output;

/// PID of the container's holder.
const HOLDER: u32 = 4242;

fn container() -> (Arc<Container>, Kept) {
    let (publisher, kept) = Publisher::kept();
    let subject = Subject { id: "c".into(), bundle: "/bundle".into(), annotations: Default::default(), pid: HOLDER };
    let request = CreateTaskRequest { id: "c".into(), ..Default::default() };
    let choice = RootChoice { kind: RootKind::Virtiofs, why: "configured" };
    let root = Root { choice, changes: None };
    let container = Container::new(request, subject, true, true, Vec::new(), root, publisher);
    container.process("").unwrap().set_guest_pid(1);
    (container, kept)
}

/// Adds a running exec with a stdout. The returned function reports progress of its reader.
fn exec(container: &Container, id: &str, pid: u32) -> impl Fn(bool) + Send + 'static + use<> {
    let process = Arc::new(Process::new(id, Stdio::default(), HOLDER));
    process.set_guest_pid(pid);
    let (output, progress) = Output::pretended();
    process.attach_fake(output);
    assert!(container.add(process));
    progress
}

fn exited(exec: &str, status: u32) -> TaskChange {
    TaskChange::Exited { exec: exec.into(), pid: 99, status, at: None, output: [0; 2] }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp { seconds, ..Default::default() }
}

/// The events published so far: each as its topic without `/tasks/`, an exit with its process and status.
async fn published(kept: &mut Kept) -> Vec<String> {
    // Let all tasks run: the paused clock advances only when none can.
    tokio::time::sleep(Duration::from_millis(1)).await;
    std::iter::from_fn(|| kept.take())
        .map(|envelope| {
            let event = &envelope.event;
            assert!(event.type_url.starts_with("containerd.events.Task"), "{}", event.type_url);
            let topic = envelope.topic.trim_start_matches("/tasks/");
            match topic {
                "exit" => {
                    let exit = TaskExit::parse_from_bytes(&event.value).unwrap();
                    format!("exit {} {}", exit.id, exit.exit_status)
                }
                topic => topic.to_owned(),
            }
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn events_are_published_as_the_shims_own_messages() {
    let (container, mut kept) = container();
    let process = Arc::new(Process::new("e", Stdio::default(), HOLDER));
    assert!(container.add(process.clone()));
    container.apply(TaskChange::ExecAdded { exec: "e".into() }, at(1)).await;
    container.apply(TaskChange::ExecStarted { exec: "e".into(), pid: 7 }, at(2)).await;
    assert_eq!((process.pid(), process.guest_pid()), (HOLDER, 7));
    container.apply(TaskChange::Deleted { pid: 5, status: 6, at: None }, at(3)).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let added = kept.take().unwrap();
    assert_eq!((added.topic.as_str(), added.timestamp.seconds), ("/tasks/exec-added", 1));
    let expected = TaskExecAdded { container_id: "c".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(TaskExecAdded::parse_from_bytes(&added.event.value).unwrap(), expected);
    let started = TaskExecStarted::parse_from_bytes(&kept.take().unwrap().event.value).unwrap();
    assert_eq!((started.container_id.as_str(), started.exec_id.as_str(), started.pid), ("c", "e", HOLDER));
    let deleted = TaskDelete::parse_from_bytes(&kept.take().unwrap().event.value).unwrap();
    assert_eq!((deleted.container_id.as_str(), deleted.pid, deleted.exit_status), ("c", HOLDER, 6));
    // Events of unknown processes are dropped.
    container.apply(TaskChange::ExecStarted { exec: "x".into(), pid: 7 }, at(4)).await;
    assert_eq!(published(&mut kept).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_oom_events_does_not_wait_for_containerd() {
    let (container, mut kept) = container();
    for _ in 0..100_000 {
        container.apply(TaskChange::OutOfMemory, at(1)).await;
    }
    assert!(published(&mut kept).await.iter().all(|topic| topic == "oom"));
}

/// Reports a change as a guest does: illegal ones are dropped.
async fn report(container: &Container, change: TaskChange) {
    if container.admit(&change).is_ok() {
        container.apply(change, at(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_floods_its_host_with_events_reaches_no_subscriber_with_them() {
    let (container, mut kept) = container();
    let process = Arc::new(Process::new("e", Stdio::default(), HOLDER));
    assert!(container.add(process));
    let deleted = || TaskChange::Deleted { pid: 1, status: 0, at: None };
    let flood = async || {
        for _ in 0..1000 {
            for change in [
                TaskChange::Created { pid: 1 },
                TaskChange::Started { pid: 1 },
                TaskChange::ExecAdded { exec: "e".into() },
                TaskChange::ExecStarted { exec: "e".into(), pid: 2 },
                TaskChange::OutOfMemory,
                TaskChange::Paused,
                TaskChange::Resumed,
                deleted(),
            ] {
                report(&container, change).await;
            }
        }
    };
    flood().await;
    let mut topics = published(&mut kept).await;
    let all = topics.len();
    topics.retain(|topic| topic != "oom");
    assert_eq!(topics, ["create", "start", "exec-added", "exec-started"]);
    assert_eq!(all - topics.len(), 16);
    // A call that succeeds has one event, one that fails has none.
    container.request(Request::Pause, async { Ok(()) }).await.unwrap();
    let failed = ttrpc::Error::RpcStatus(ttrpc::get_status(Code::FAILED_PRECONDITION, "it is not paused"));
    container.request(Request::Resume, async { Err::<(), _>(failed) }).await.unwrap_err();
    flood().await;
    assert_eq!(published(&mut kept).await, ["paused"]);
    for exec in ["e", "", "e", ""] {
        report(&container, exited(exec, 3)).await;
    }
    container.request(Request::Delete, async { Ok(()) }).await.unwrap();
    flood().await;
    assert_eq!(published(&mut kept).await, ["exit e 3", "exit c 3", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_reader_delays_only_its_own_exit_and_the_init_exit() {
    let (container, mut kept) = container();
    let _stalled = exec(&container, "stalled", 2);
    let read = exec(&container, "read", 3);
    container.apply(exited("stalled", 4), at(1)).await;
    container.apply(exited("read", 5), at(2)).await;
    container.apply(TaskChange::Paused, at(3)).await;
    read(true);
    assert_eq!(published(&mut kept).await, ["paused", "exit read 5"]);
    container.apply(exited("", 6), at(4)).await;
    container.apply(TaskChange::Deleted { pid: 1, status: 6, at: None }, at(5)).await;
    assert_eq!(published(&mut kept).await, [""; 0]);
    let started = Instant::now();
    container.delete_published().await;
    assert!(started.elapsed() <= Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(published(&mut kept).await, ["exit stalled 4", "exit c 6", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn a_trickling_reader_delays_an_exit_for_a_limited_time() {
    let (container, mut kept) = container();
    let trickle = exec(&container, "e", 2);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            trickle(false);
        }
    });
    container.apply(exited("e", 4), at(1)).await;
    let started = Instant::now();
    container.process("e").unwrap().exit_reported().await;
    assert_eq!(started.elapsed(), Duration::ZERO, "the report does not wait for the reader");
    container.process("e").unwrap().exited().await;
    let took = started.elapsed();
    assert!(took > Duration::from_secs(8) && took < EXIT_RECORDED, "{took:?}");
    assert_eq!(published(&mut kept).await, ["exit e 4"]);
}

#[tokio::test(start_paused = true)]
async fn an_exit_is_recorded_and_published_when_the_holder_has_ended() {
    let (container, mut kept) = container();
    let init = container.process("").unwrap();
    let representing = init.represent();
    container.apply(exited("", 4), at(1)).await;
    init.ending().await;
    assert_eq!(published(&mut kept).await, [""; 0]);
    assert!(init.exit().is_none());
    drop(representing);
    init.exited().await;
    assert_eq!(published(&mut kept).await, ["exit c 4"]);
}

#[tokio::test(start_paused = true)]
async fn processes_that_die_with_their_vm_share_one_wait_and_exit_in_order() {
    let (container, mut kept) = container();
    let readers: Vec<_> = (0..20).map(|n| exec(&container, &format!("e{n:02}"), n + 2)).collect();
    // This exec exited before the VM died.
    container.apply(exited("e00", 3), at(1)).await;
    container.vm_died(at(2));
    container.vm_died(at(3));
    assert_eq!(published(&mut kept).await, [""; 0]);
    let started = Instant::now();
    container.ended().await;
    assert!(started.elapsed() <= Duration::from_secs(5), "{:?}", started.elapsed());
    let mut exits = published(&mut kept).await;
    assert_eq!(exits.pop().as_deref(), Some("exit c 137"));
    exits.sort();
    let expected: Vec<_> = (0..20).map(|n| format!("exit e{n:02} {}", if n == 0 { 3 } else { 137 })).collect();
    assert_eq!(exits, expected);
    drop(readers);
}

#[tokio::test(start_paused = true)]
async fn an_exec_that_never_ran_ends_with_its_vm_without_an_event() {
    let (container, mut kept) = container();
    let process = Arc::new(Process::new("never", Stdio::default(), HOLDER));
    assert!(container.add(process.clone()));
    container.vm_died(at(2));
    assert_eq!(process.exit(), Some(Exit { status: 137, at: at(2) }));
    assert_eq!(published(&mut kept).await, ["exit c 137"]);
}

#[tokio::test(start_paused = true)]
async fn only_the_first_report_of_an_exit_counts() {
    let (container, mut kept) = container();
    let read = exec(&container, "e", 2);
    for status in 0..1000 {
        container.apply(exited("e", status), at(1)).await;
        container.apply(TaskChange::Deleted { pid: 1, status, at: None }, at(1)).await;
    }
    assert_eq!(container.pending().len(), 1);
    read(true);
    assert_eq!(published(&mut kept).await, ["exit e 0", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn pending_exits_are_published_after_the_container_is_dropped() {
    let (container, mut kept) = container();
    let _stalled = exec(&container, "e", 2);
    container.apply(exited("e", 4), at(1)).await;
    container.apply(exited("", 5), at(1)).await;
    drop(container);
    tokio::time::sleep(EXIT_RECORDED).await;
    assert_eq!(published(&mut kept).await, ["exit e 4", "exit c 5"]);
}
