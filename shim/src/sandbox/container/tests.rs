//! In which order containerd hears of a container's processes, and when, with readers that do not read. On a clock that stands still while
//! anything can run.

use std::time::Duration;

use protobuf::Message;
use tokio::time::Instant;

use super::*;
use crate::containerd::publisher::Kept;
use crate::stdio::Output;

fn container() -> (Arc<Container>, Kept) {
    let (publisher, kept) = Publisher::kept();
    let subject = Subject { id: "c".into(), bundle: "/bundle".into(), annotations: Default::default() };
    let request = CreateTaskRequest { id: "c".into(), ..Default::default() };
    let container = Container::new(request, subject, Vec::new(), publisher);
    container.process("").unwrap().set_pid(1);
    (container, kept)
}

/// Adds a running exec with a stdout.
fn exec(container: &Container, id: &str, pid: u32) -> impl Fn(bool) + Send + 'static + use<> {
    let process = Arc::new(Process::new(id, Stdio::default()));
    process.set_pid(pid);
    let (output, progress) = Output::pretended();
    process.attach_pretended(output);
    assert!(container.add(process));
    progress
}

fn exited(exec: &str, status: u32) -> News {
    News::Exited { exec: exec.into(), pid: 99, status, at: None }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp { seconds, ..Default::default() }
}

/// What has been published: the topic's last word, of an exit with its process and its status.
async fn published(kept: &mut Kept) -> Vec<String> {
    // Lets every task run that can; the clock moves on only when none can.
    tokio::time::sleep(Duration::from_millis(1)).await;
    std::iter::from_fn(|| kept.take())
        .map(|envelope| {
            let event = &envelope.event;
            assert!(event.type_url.starts_with("containerd.events.Task"), "{}", event.type_url);
            let word = envelope.topic.trim_start_matches("/tasks/");
            match word {
                "exit" => {
                    let exit = TaskExit::parse_from_bytes(&event.value).unwrap();
                    format!("exit {} {}", exit.id, exit.exit_status)
                }
                word => word.to_owned(),
            }
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_told_goes_on_in_messages_of_the_shim() {
    let (container, mut kept) = container();
    let process = Arc::new(Process::new("e", Stdio::default()));
    assert!(container.add(process.clone()));
    container.told(News::ExecAdded { exec: "e".into() }, at(1)).await;
    container.told(News::ExecStarted { exec: "e".into(), pid: 7 }, at(2)).await;
    assert_eq!(process.pid(), 7);
    container.told(News::Deleted { pid: 5, status: 6, at: None }, at(3)).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    let added = kept.take().unwrap();
    assert_eq!((added.topic.as_str(), added.timestamp.seconds), ("/tasks/exec-added", 1));
    let wanted = TaskExecAdded { container_id: "c".into(), exec_id: "e".into(), ..Default::default() };
    assert_eq!(TaskExecAdded::parse_from_bytes(&added.event.value).unwrap(), wanted);
    let started = TaskExecStarted::parse_from_bytes(&kept.take().unwrap().event.value).unwrap();
    assert_eq!((started.container_id.as_str(), started.exec_id.as_str(), started.pid), ("c", "e", 7));
    let deleted = TaskDelete::parse_from_bytes(&kept.take().unwrap().event.value).unwrap();
    assert_eq!((deleted.container_id.as_str(), deleted.pid, deleted.exit_status), ("c", 1, 6));
    // Of what is not there nothing goes on.
    container.told(News::ExecStarted { exec: "x".into(), pid: 7 }, at(4)).await;
    assert_eq!(published(&mut kept).await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn ooms_without_number_do_not_wait_for_containerd() {
    let (container, mut kept) = container();
    for _ in 0..100_000 {
        container.told(News::OutOfMemory, at(1)).await;
    }
    assert!(published(&mut kept).await.iter().all(|word| word == "oom"));
}

#[tokio::test(start_paused = true)]
async fn a_reader_who_does_not_read_holds_up_one_exit_and_the_inits() {
    let (container, mut kept) = container();
    let _stalled = exec(&container, "stalled", 2);
    let read = exec(&container, "read", 3);
    container.told(exited("stalled", 4), at(1)).await;
    container.told(exited("read", 5), at(2)).await;
    container.told(News::Paused, at(3)).await;
    read(true);
    assert_eq!(published(&mut kept).await, ["paused", "exit read 5"]);
    container.told(exited("", 6), at(4)).await;
    container.told(News::Deleted { pid: 1, status: 6, at: None }, at(5)).await;
    assert_eq!(published(&mut kept).await, [""; 0]);
    let begun = Instant::now();
    container.delete_published().await;
    assert!(begun.elapsed() <= Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(published(&mut kept).await, ["exit stalled 4", "exit c 6", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn a_reader_who_takes_a_little_now_and_then_gets_some_time_and_not_all() {
    let (container, mut kept) = container();
    let trickle = exec(&container, "e", 2);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            trickle(false);
        }
    });
    container.told(exited("e", 4), at(1)).await;
    let begun = Instant::now();
    container.process("e").unwrap().exited().await;
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(8) && took < EXIT_RECORDED, "{took:?}");
    assert_eq!(published(&mut kept).await, ["exit e 4"]);
}

#[tokio::test(start_paused = true)]
async fn what_dies_with_its_vm_is_waited_for_together_and_told_in_order() {
    let (container, mut kept) = container();
    let readers: Vec<_> = (0..20).map(|n| exec(&container, &format!("e{n:02}"), n + 2)).collect();
    // Its true end came before the VM's.
    container.told(exited("e00", 3), at(1)).await;
    container.died(at(2));
    container.died(at(3));
    assert_eq!(published(&mut kept).await, [""; 0]);
    let begun = Instant::now();
    container.ended().await;
    assert!(begun.elapsed() <= Duration::from_secs(5), "{:?}", begun.elapsed());
    let mut told = published(&mut kept).await;
    assert_eq!(told.pop().as_deref(), Some("exit c 137"));
    told.sort();
    let wanted: Vec<_> = (0..20).map(|n| format!("exit e{n:02} {}", if n == 0 { 3 } else { 137 })).collect();
    assert_eq!(told, wanted);
    drop(readers);
}

#[tokio::test(start_paused = true)]
async fn an_exec_that_never_ran_ends_with_its_vm_without_being_told_of() {
    let (container, mut kept) = container();
    let process = Arc::new(Process::new("never", Stdio::default()));
    assert!(container.add(process.clone()));
    container.died(at(2));
    assert_eq!(process.exit(), Some(Exit { status: 137, at: at(2) }));
    assert_eq!(published(&mut kept).await, ["exit c 137"]);
}

#[tokio::test(start_paused = true)]
async fn the_first_report_of_an_end_counts_and_the_others_cost_nothing() {
    let (container, mut kept) = container();
    let read = exec(&container, "e", 2);
    for status in 0..1000 {
        container.told(exited("e", status), at(1)).await;
        container.told(News::Deleted { pid: 1, status, at: None }, at(1)).await;
    }
    assert_eq!(container.pending().len(), 1);
    read(true);
    assert_eq!(published(&mut kept).await, ["exit e 0", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_still_to_be_told_outlives_the_container() {
    let (container, mut kept) = container();
    let _stalled = exec(&container, "e", 2);
    container.told(exited("e", 4), at(1)).await;
    container.told(exited("", 5), at(1)).await;
    drop(container);
    tokio::time::sleep(EXIT_RECORDED).await;
    assert_eq!(published(&mut kept).await, ["exit e 4", "exit c 5"]);
}
