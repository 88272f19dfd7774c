//! A guest that has turned, for the tests of the host: the feature `hostile` puts it in front of the guest's services.
//! The init of a release does not contain it.
//!
//! A container whose id is `lie-NAME`, or begins with `lie-NAME-`, gets the lies of that name; the host is told the truth
//! of others.
//!
//! | name | what the guest does |
//! |---|---|
//! | `deaf` | Kill, Delete and Shutdown answer OK and do nothing |
//! | `undying` | the exit of a process is never reported, neither by Wait nor by an event |
//! | `flood` | after Start, events without end: pauses, OOMs, starts and exits that never were |
//! | `chatter` | after Start, log lines without end |
//! | `dial` | after Start, connections to the host without end |
//! | `huge` | Exec fails with a message of 256 KiB, which forges a line of the log and holds terminal sequences |
//! | `absurd` | PIDs, exit statuses, times and statistics that cannot be, and a million processes |
//! | `late` | an exit follows more output than the process has written |
//! | `early` | an exit follows no output |
//! | `silent` | Exec, Pids and Stats are never answered |

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM, TaskPaused, TaskStart};
use containerd_shim_protos::shim_async::Task;
use husk_protos::HOST_CID;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};
use tokio_vsock::{VsockAddr, VsockStream};
use ttrpc::r#async::TtrpcContext;

use crate::error::{CallError, FailureKind};
use crate::events::{Events, Next};
use crate::task::service::TaskService;

/// Log lines of a flood between two moments in which the guest does something else.
const WAVE: usize = 64;
/// Time between two waves of events: a thousand events a second, which the host can just read. It fails a guest whose
/// events are lost.
const PAUSE: Duration = Duration::from_millis(10);

/// Length of what is too long and yet within the host's limit of a reply.
const LONG: usize = 256 * 1024;

/// The Task service of a hostile guest.
pub(crate) struct Liar {
    truth: TaskService,
    /// The events that the host sees.
    shown: Arc<Events>,
    ready_port: u32,
    /// A container that is deaf has been created: Shutdown names none.
    deaf: AtomicBool,
}

fn lies(id: &str, name: &str) -> bool {
    let rest = id.strip_prefix("lie-").and_then(|rest| rest.strip_prefix(name));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// 2^63 - 1 seconds and a negative fraction.
fn never() -> MessageField<Timestamp> {
    MessageField::some(Timestamp { seconds: i64::MAX, nanos: -5, ..Default::default() })
}

impl Liar {
    /// `events` are the true ones. Returns those that the host sees as well.
    pub(crate) fn new(truth: TaskService, events: Arc<Events>, ready_port: u32) -> (Self, Arc<Events>) {
        let shown = Arc::new(Events::default());
        tokio::spawn(censor(events, shown.clone()));
        let deaf = AtomicBool::new(false);
        (Self { truth, shown: shown.clone(), ready_port, deaf }, shown)
    }

    fn misbehave(&self, id: &str) {
        if lies(id, "flood") {
            tokio::spawn(flood(self.shown.clone(), id.to_owned()));
        }
        if lies(id, "chatter") {
            tokio::spawn(async {
                loop {
                    for _ in 0..WAVE {
                        tracing::error!(
                            level = "info",
                            sandbox = "forged",
                            "\x1b[2Jlevel=error msg=forged\n{}",
                            "x".repeat(4096)
                        );
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
        if lies(id, "dial") {
            tokio::spawn(dial(self.ready_port));
        }
    }
}

/// Copies events, except for the exits of those who never die, and lies about the output before others.
async fn censor(events: Arc<Events>, shown: Arc<Events>) {
    let (mut newest, mut after) = (events.newest(), 0);
    loop {
        while let Next::Event(event) = events.next(after) {
            after = event.sequence;
            let any = event.event.unwrap_or_default();
            let exit = TaskExit::parse_from_bytes(&any.value).unwrap_or_default();
            let output = match exit.container_id.as_str() {
                id if lies(id, "late") => [u64::MAX; 2],
                id if lies(id, "early") => [0; 2],
                _ => [event.stdout_bytes, event.stderr_bytes],
            };
            if event.topic != "/tasks/exit" || !lies(&exit.container_id, "undying") {
                shown.add(&event.topic, any, output);
            }
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

async fn flood(shown: Arc<Events>, id: String) {
    let container_id = id.as_str();
    for pid in 0.. {
        for _ in 0..2 {
            shown.publish("/tasks/paused", &TaskPaused { container_id: container_id.into(), ..Default::default() });
            shown.publish("/tasks/oom", &TaskOOM { container_id: container_id.into(), ..Default::default() });
            let start = TaskStart { container_id: container_id.into(), pid, ..Default::default() };
            shown.publish("/tasks/start", &start);
            let exit = TaskExit { container_id: "other".into(), exit_status: u32::MAX, ..Default::default() };
            shown.publish("/tasks/exit", &TaskExit { exited_at: never(), ..exit });
            shown.add("/forged/topic", Any { value: vec![0xff; 1024], ..Any::default() }, [0; 2]);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Opens connections and keeps them.
async fn dial(port: u32) {
    let mut kept = Vec::new();
    loop {
        match VsockStream::connect(VsockAddr::new(HOST_CID, port)).await {
            Ok(stream) => kept.push(stream),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

#[async_trait]
impl Task for Liar {
    async fn create(&self, context: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let absurd = lies(&request.id, "absurd");
        if lies(&request.id, "deaf") {
            self.deaf.store(true, Ordering::Relaxed);
        }
        let response = self.truth.create(context, request).await?;
        Ok(if absurd { CreateTaskResponse { pid: u32::MAX, ..response } } else { response })
    }

    async fn start(&self, context: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let id = request.id.clone();
        let response = self.truth.start(context, request).await?;
        self.misbehave(&id);
        Ok(if lies(&id, "absurd") { StartResponse { pid: u32::MAX, ..response } } else { response })
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        if lies(&request.id, "deaf") {
            return Ok(DeleteResponse::new());
        }
        if lies(&request.id, "absurd") {
            self.truth.delete(context, request).await?;
            let response = DeleteResponse { pid: u32::MAX, exit_status: u32::MAX, ..Default::default() };
            return Ok(DeleteResponse { exited_at: never(), ..response });
        }
        self.truth.delete(context, request).await
    }

    async fn exec(&self, context: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if lies(&request.id, "silent") {
            pending::<()>().await;
        }
        if lies(&request.id, "huge") {
            let message = format!("\x1b]0;owned\x07\u{202e}\nlevel=error msg=\"forged\"\n{}", "A".repeat(LONG));
            return Err(CallError::new(FailureKind::Internal, message).into());
        }
        self.truth.exec(context, request).await
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        if lies(&request.id, "deaf") {
            return Ok(Empty::new());
        }
        self.truth.kill(context, request).await
    }

    async fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (undying, absurd) = (lies(&request.id, "undying"), lies(&request.id, "absurd"));
        let response = self.truth.wait(context, request).await?;
        if undying {
            pending::<()>().await;
        }
        if absurd {
            return Ok(WaitResponse { exit_status: u32::MAX, exited_at: never(), ..Default::default() });
        }
        Ok(response)
    }

    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let absurd = lies(&request.id, "absurd");
        let response = self.truth.state(context, request).await?;
        if !absurd {
            return Ok(response);
        }
        let response = StateResponse { id: "x".repeat(LONG), pid: u32::MAX, exit_status: u32::MAX, ..response };
        Ok(StateResponse { status: EnumOrUnknown::from_i32(-7), exited_at: never(), ..response })
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        if lies(&request.id, "silent") {
            pending::<()>().await;
        }
        if lies(&request.id, "absurd") {
            let processes = vec![ProcessInfo::new(); 1_000_000];
            return Ok(PidsResponse { processes, ..Default::default() });
        }
        self.truth.pids(context, request).await
    }

    async fn stats(&self, context: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        if lies(&request.id, "silent") {
            pending::<()>().await;
        }
        if lies(&request.id, "absurd") {
            let stats =
                Any { type_url: "io.containerd.cgroups.v1.Metrics".into(), value: vec![0xff; LONG], ..Any::default() };
            return Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() });
        }
        self.truth.stats(context, request).await
    }

    async fn shutdown(&self, context: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.deaf.load(Ordering::Relaxed) {
            return Ok(Empty::new());
        }
        self.truth.shutdown(context, request).await
    }

    async fn connect(&self, context: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.truth.connect(context, request).await
    }

    async fn close_io(&self, context: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.truth.close_io(context, request).await
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.truth.pause(context, request).await
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.truth.resume(context, request).await
    }

    async fn checkpoint(&self, context: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.truth.checkpoint(context, request).await
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.truth.resize_pty(context, request).await
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.truth.update(context, request).await
    }
}
