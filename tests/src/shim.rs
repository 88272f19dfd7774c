//! A shim driven by the test instead of containerd: started as containerd starts it, and called over raw TTRPC.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
pub use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{self, Code, proto::Request};
use serde_json::Value;

use crate::artifacts::{Runtime, Version, built};
use crate::bundle::{Bundle, process, spec};
use crate::command::{self, Output};
use crate::containerd::{Containerd, NAMESPACE};
use crate::events::Sink;
use crate::fifo;

/// Deadline for one call: Create boots a VM without an accelerator.
const CALL: Duration = Duration::from_secs(60);
/// Deadline for `start` and `delete`. containerd waits 10 s and 5 s; a loaded machine needs more.
const ACTION: Duration = Duration::from_secs(30);

/// The Task service's name in containerd 1.x and 2.x; the messages are identical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `containerd.task.v2.Task`
    V2,
    /// `containerd.task.v3.Task`
    V3,
}

impl Api {
    fn service(self) -> &'static str {
        match self {
            Self::V2 => "containerd.task.v2.Task",
            Self::V3 => "containerd.task.v3.Task",
        }
    }
}

/// A client of the Task service.
#[derive(Clone)]
pub struct Task {
    client: ttrpc::Client,
    api: Api,
}

impl Task {
    /// Connects to a shim's socket.
    pub fn connect(socket: &Path, api: Api) -> Result<Self> {
        let address = format!("unix://{}", socket.display());
        let client = ttrpc::Client::connect(&address).with_context(|| format!("connect to the shim's {address}"))?;
        Ok(Self { client, api })
    }

    /// Calls any method, under this client's service name.
    pub fn call<Q: Message, A: Message>(&self, method: &str, request: &Q) -> ttrpc::Result<A> {
        self.call_service(self.api.service(), method, request)
    }

    /// Calls any method of any service.
    pub fn call_service<Q: Message, A: Message>(&self, service: &str, method: &str, request: &Q) -> ttrpc::Result<A> {
        let request = Request {
            service: service.into(),
            method: method.into(),
            timeout_nano: CALL.as_nanos() as i64,
            payload: request.write_to_bytes().map_err(|e| ttrpc::Error::Others(e.to_string()))?,
            ..Default::default()
        };
        let response = self.client.request(request)?;
        A::parse_from_bytes(&response.payload)
            .map_err(|e| ttrpc::Error::Others(format!("decode the response to {method}: {e}")))
    }

    /// Start. Returns the PID.
    pub fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("Start", &request).map(|response: api::StartResponse| response.pid)
    }

    /// State.
    pub fn state(&self, id: &str, exec: &str) -> ttrpc::Result<api::StateResponse> {
        self.call("State", &api::StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() })
    }

    /// Wait. Returns the exit status.
    pub fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("Wait", &request).map(|response: api::WaitResponse| response.exit_status)
    }

    /// Kill.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest { id: id.into(), exec_id: exec.into(), signal, ..Default::default() };
        self.call("Kill", &request).map(|_: api::Empty| ())
    }

    /// CloseIO for stdin.
    pub fn close_stdin(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        let request = api::CloseIORequest { id: id.into(), exec_id: exec.into(), stdin: true, ..Default::default() };
        self.call("CloseIO", &request).map(|_: api::Empty| ())
    }

    /// ResizePty.
    pub fn resize(&self, id: &str, exec: &str, height: u32, width: u32) -> ttrpc::Result<()> {
        let request =
            api::ResizePtyRequest { id: id.into(), exec_id: exec.into(), height, width, ..Default::default() };
        self.call("ResizePty", &request).map(|_: api::Empty| ())
    }

    /// Delete. Returns the exit status.
    pub fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = api::DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.call("Delete", &request).map(|response: api::DeleteResponse| response.exit_status)
    }

    /// Exec of a process in the form of [`crate::bundle::process`].
    pub fn exec(&self, id: &str, exec: &str, process: &Value, io: &Streams) -> Result<()> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(process)?,
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: io.terminal,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.call("Exec", &request).map(|_: api::Empty| ()).with_context(|| format!("exec {exec}"))
    }

    /// Kill for all processes of a container.
    pub fn kill_all(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest { id: id.into(), signal, all: true, ..Default::default() };
        self.call("Kill", &request).map(|_: api::Empty| ())
    }

    /// Pause.
    pub fn pause(&self, id: &str) -> ttrpc::Result<()> {
        self.call("Pause", &api::PauseRequest { id: id.into(), ..Default::default() }).map(|_: api::Empty| ())
    }

    /// Resume.
    pub fn resume(&self, id: &str) -> ttrpc::Result<()> {
        self.call("Resume", &api::ResumeRequest { id: id.into(), ..Default::default() }).map(|_: api::Empty| ())
    }

    /// Pids.
    pub fn pids(&self, id: &str) -> ttrpc::Result<Vec<api::ProcessInfo>> {
        let request = api::PidsRequest { id: id.into(), ..Default::default() };
        self.call("Pids", &request).map(|response: api::PidsResponse| response.processes)
    }

    /// Update with resources in the form of a spec's `linux.resources`.
    pub fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let any = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::UpdateTaskRequest { id: id.into(), resources: Some(any).into(), ..Default::default() };
        self.call("Update", &request).map(|_: api::Empty| ())
    }

    /// Stats, as the undecoded message.
    pub fn stats(&self, id: &str) -> ttrpc::Result<Any> {
        let request = api::StatsRequest { id: id.into(), ..Default::default() };
        self.call("Stats", &request).map(|response: api::StatsResponse| response.stats.unwrap_or_default())
    }

    /// Stats, decoded as cgroup v2 metrics.
    pub fn metrics(&self, id: &str) -> Result<Metrics> {
        let stats = self.stats(id)?;
        match stats.type_url.as_str() {
            "io.containerd.cgroups.v2.Metrics" => Ok(Metrics::parse_from_bytes(&stats.value)?),
            other => bail!("stats of {id} are {other}"),
        }
    }

    /// Shutdown.
    pub fn shutdown(&self, id: &str, now: bool) -> ttrpc::Result<()> {
        let request = api::ShutdownRequest { id: id.into(), now, ..Default::default() };
        self.call("Shutdown", &request).map(|_: api::Empty| ())
    }
}

/// The error code of a rejected call; `None` for success and for other failures.
pub fn code<T>(result: &ttrpc::Result<T>) -> Option<Code> {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => Some(status.code()),
        _ => None,
    }
}

/// Paths of a process's standard streams; empty means none.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    /// Read by the process.
    pub stdin: String,
    /// Written by the process.
    pub stdout: String,
    /// Written by the process.
    pub stderr: String,
    /// All streams are one terminal.
    pub terminal: bool,
}

/// How containerd starts a shim.
pub enum Bootstrap {
    /// Up to 2.2: flags and environment.
    Flags,
    /// Like [`Self::Flags`], with the runtime's options on stdin.
    Options(Any),
    /// From 2.3: `BootstrapParams` on stdin.
    Params,
    /// `BootstrapParams` without addresses, which are in the environment and in the flags.
    ParamsWithoutAddresses,
}

/// A running shim with its bundle.
pub struct Shim<'a> {
    containerd: &'a Containerd,
    /// Bundle of the shim's first container.
    pub bundle: Bundle,
    /// Events that the shim publishes.
    pub events: Sink,
    /// Client of the shim's Task service.
    pub task: Task,
    /// Path of the shim's socket, as the shim reports it.
    pub socket: PathBuf,
}

impl<'a> Shim<'a> {
    /// Starts the shim under test for a container with this spec and waits until it serves.
    pub fn start(containerd: &'a Containerd, id: &str, spec: &Value) -> Result<Self> {
        Self::start_with(containerd, id, spec, Sink::start()?)
    }

    /// Like [`Self::start`], with this sink for events.
    pub fn start_with(containerd: &'a Containerd, id: &str, spec: &Value, events: Sink) -> Result<Self> {
        Self::start_bundle(containerd, Bundle::write(containerd, id, spec)?, events)
    }

    /// Starts the shim under test for a sandbox, as containerd's Sandbox API does: its bundle has no `config.json`.
    pub fn start_sandbox(containerd: &'a Containerd, id: &str) -> Result<Self> {
        let bundle = Bundle::write(containerd, id, &Value::Null)?;
        std::fs::remove_file(bundle.outside.join("config.json"))?;
        Self::start_bundle(containerd, bundle, Sink::start()?)
    }

    fn start_bundle(containerd: &'a Containerd, bundle: Bundle, events: Sink) -> Result<Self> {
        let started = action(containerd, &bundle, &events, &Bootstrap::Flags, "start")?.ok()?;
        let socket = address(&started.text())?;
        let api = match (containerd.runtime(), containerd.version()) {
            (Runtime::Runc, Version::V2_1 | Version::V2_4) => Api::V3,
            _ => Api::V2,
        };
        let task = Task::connect(&containerd.path(&socket), api)?;
        Ok(Self { containerd, bundle, events, task, socket })
    }

    /// Like [`Self::start`]; also creates and starts the container, without streams.
    pub fn running(containerd: &'a Containerd, id: &str, spec: &Value) -> Result<Self> {
        let shim = Self::start(containerd, id, spec)?;
        shim.run_detached()?;
        Ok(shim)
    }

    /// Starts a shim with a running container that only sleeps.
    pub fn idle(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let id = containerd.id(name);
        Self::running(containerd, &id, &spec(&id, &["sleep", "1000"]))
    }

    /// A second client, with a service name of choice.
    pub fn client(&self, api: Api) -> Result<Task> {
        Task::connect(&self.containerd.path(&self.socket), api)
    }

    /// The containerd whose namespaces the shim runs in.
    pub fn containerd(&self) -> &'a Containerd {
        self.containerd
    }

    /// Creates fifos for a process. Returns their paths for the request, and the reading ends of stdout and stderr.
    pub fn streams(&self, name: &str) -> Result<(Streams, fifo::Reader, fifo::Reader)> {
        let inside = |stream: &str| self.bundle.path.join(format!("{name}.{stream}"));
        let outside = |stream: &str| self.bundle.outside.join(format!("{name}.{stream}"));
        let (stdout, stderr) = (fifo::Reader::make(&outside("out"))?, fifo::Reader::make(&outside("err"))?);
        let text = |path: PathBuf| path.display().to_string();
        let streams = Streams { stdout: text(inside("out")), stderr: text(inside("err")), ..Streams::default() };
        Ok((streams, stdout, stderr))
    }

    /// Creates and starts the container, and returns its id.
    pub fn run_detached(&self) -> Result<&str> {
        self.create_and_start(&Streams::default())?;
        Ok(&self.bundle.id)
    }

    /// Creates the container with these streams and starts it.
    pub fn create_and_start(&self, io: &Streams) -> Result<()> {
        self.create(io)?;
        self.task.start(&self.bundle.id, "")?;
        Ok(())
    }

    /// Adds an exec to the container and starts it.
    pub fn start_exec(&self, exec: &str, process: &Value, io: &Streams) -> Result<()> {
        self.task.exec(&self.bundle.id, exec, process, io)?;
        self.task.start(&self.bundle.id, exec)?;
        Ok(())
    }

    /// Kills and deletes the container, as the kubelet does, and removes its bundle.
    pub fn remove(&self) -> Result<()> {
        let id = &self.bundle.id;
        self.task.kill(id, "", 9)?;
        self.task.wait(id, "")?;
        self.task.delete(id, "")?;
        std::fs::remove_dir_all(&self.bundle.outside).context("remove the bundle")
    }

    /// Asks the shim to shut down, which has no effect while its sandbox has other containers.
    pub fn shutdown(&self) {
        // The shim may exit before its response is sent.
        let _ = self.task.shutdown(&self.bundle.id, false);
    }

    /// Runs an exec until it exits, deletes it, and returns its exit status, stdout and stderr.
    pub fn exec_process(&self, exec: &str, process: &Value) -> Result<(u32, String, String)> {
        let (io, mut stdout, mut stderr) = self.streams(exec)?;
        let id = &self.bundle.id;
        self.task.exec(id, exec, process, &io)?;
        if let Err(error) = self.task.start(id, exec) {
            // As containerd's clients do.
            self.task.delete(id, exec)?;
            return Err(error.into());
        }
        let status = self.task.wait(id, exec)?;
        let (out, err) = (stdout.read_to_end(CALL)?, stderr.read_to_end(CALL)?);
        self.task.delete(id, exec)?;
        for stream in ["out", "err"] {
            std::fs::remove_file(self.bundle.outside.join(format!("{exec}.{stream}")))?;
        }
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        Ok((status, text(out), text(err)))
    }

    /// Like [`Self::exec_process`] for a command; returns exit status and stdout.
    pub fn exec(&self, exec: &str, args: &[&str]) -> Result<(u32, String)> {
        let (status, out, _) = self.exec_process(exec, &process(args))?;
        Ok((status, out))
    }

    /// Runs a shell script as an exec, which must succeed, and returns its output.
    pub fn script(&self, exec: &str, script: &str) -> Result<String> {
        match self.exec_process(exec, &process(&["sh", "-c", script]))? {
            (0, out, _) => Ok(out),
            (status, out, err) => bail!("{script}: {status}\n{out}\n{err}"),
        }
    }

    /// Creates the fifos of a process with a terminal. Returns their paths, the file to type into, and the reader of
    /// the output.
    pub fn terminal(&self, name: &str) -> Result<(Streams, std::fs::File, fifo::Reader)> {
        let path = |stream: &str| format!("{name}.{stream}");
        let (input, output) = (path("input"), path("output"));
        let ends =
            (fifo::writer(&self.bundle.outside.join(&input))?, fifo::Reader::make(&self.bundle.outside.join(&output))?);
        let inside = |name: &str| self.bundle.path.join(name).display().to_string();
        let streams = Streams { stdin: inside(&input), stdout: inside(&output), terminal: true, ..Streams::default() };
        Ok((streams, ends.0, ends.1))
    }

    /// Creates the container with these streams and returns its PID.
    pub fn create(&self, io: &Streams) -> Result<u32> {
        let response: api::CreateTaskResponse = self
            .task
            .call("Create", &self.create_request(io))
            .map_err(|e| anyhow::anyhow!("create {}: {e}\n--- shim's log ---\n{}", self.bundle.id, self.log()))?;
        Ok(response.pid)
    }

    /// Calls Create without streams, which must be rejected, and returns the error message.
    pub fn create_error(&self) -> Result<String> {
        let created: ttrpc::Result<api::CreateTaskResponse> =
            self.task.call("Create", &self.create_request(&Streams::default()));
        match created {
            Ok(_) => bail!("Create succeeded"),
            Err(ttrpc::Error::RpcStatus(status)) => Ok(status.message),
            Err(other) => Err(other.into()),
        }
    }

    /// The request that [`Self::create`] sends.
    pub fn create_request(&self, io: &Streams) -> api::CreateTaskRequest {
        api::CreateTaskRequest {
            id: self.bundle.id.clone(),
            bundle: self.bundle.path.display().to_string(),
            rootfs: self.bundle.rootfs.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: io.terminal,
            ..Default::default()
        }
    }

    /// Lines that the shim has logged since the last call.
    pub fn log(&self) -> String {
        self.bundle.log.available().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Runs `delete` of the shim's binary, as containerd does for a shim that is gone.
    pub fn delete_action(&self) -> Result<Output> {
        action(self.containerd, &self.bundle, &self.events, &Bootstrap::Flags, "delete")
    }

    /// Runs the container until it exits, deletes it, and returns its exit status, stdout and stderr.
    pub fn run(&self) -> Result<(u32, String, String)> {
        let (io, mut stdout, mut stderr) = self.streams("init")?;
        self.create(&io)?;
        let id = &self.bundle.id;
        let with_log = |e: ttrpc::Error| anyhow::anyhow!("{id}: {e}\n--- shim's log ---\n{}", self.log());
        self.task.start(id, "").map_err(with_log)?;
        let status = self.task.wait(id, "").map_err(with_log)?;
        let (out, err) = (stdout.read_to_end(CALL)?, stderr.read_to_end(CALL)?);
        self.task.delete(id, "").map_err(with_log)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        Ok((status, text(out), text(err)))
    }
}

impl Drop for Shim<'_> {
    fn drop(&mut self) {
        // The test may leave the container in any state. What fails here is cleaned up with containerd.
        let id = &self.bundle.id;
        let _ = self.task.kill(id, "", 9);
        let _ = self.task.wait(id, "");
        let _ = self.task.delete(id, "");
        // As containerd does.
        self.shutdown();
    }
}

/// Runs the shim's binary with an action, as containerd does.
pub fn action(
    containerd: &Containerd,
    bundle: &Bundle,
    events: &Sink,
    bootstrap: &Bootstrap,
    action: &str,
) -> Result<Output> {
    let runtime = containerd.runtime();
    let binary = match runtime {
        Runtime::Husk => built(runtime.shim())?,
        Runtime::Runc => containerd.bin().join(runtime.shim()),
    };
    let socket = "/run/containerd/containerd.sock";
    let mut command: Command = containerd.enter("sh");
    // As containerd does: runc's shim looks for runc in PATH, and the machine may not have it installed.
    command.env("PATH", containerd.search_path());
    // Not exec: a shim inspects its parent, which must be in the same PID namespace.
    command.args(["-c", r#"cd "$0" && "$@"; exit $?"#]).arg(&bundle.path).arg(binary);
    command.args(["-namespace", NAMESPACE, "-id", &bundle.id, "-address", socket]);
    command.arg("-publish-binary").arg(containerd.bin().join("containerd"));
    if action == "delete" {
        command.arg("-bundle").arg(&bundle.path);
    }
    if !matches!(bootstrap, Bootstrap::Params) {
        command.env("TTRPC_ADDRESS", events.address()).env("GRPC_ADDRESS", socket);
        command.env("NAMESPACE", NAMESPACE);
    }
    let mut params = containerd_shim_protos::bootstrap_api::BootstrapParams {
        instance_id: bundle.id.clone(),
        namespace: NAMESPACE.into(),
        containerd_version: "2.3.0".into(),
        containerd_binary: containerd.bin().join("containerd").display().to_string(),
        ..Default::default()
    };
    let stdin = match bootstrap {
        Bootstrap::Flags => None,
        Bootstrap::Options(options) => Some(options.write_to_bytes()?),
        Bootstrap::Params => {
            params.containerd_ttrpc_address = events.address().into();
            params.containerd_grpc_address = socket.into();
            Some(params.write_to_bytes()?)
        }
        Bootstrap::ParamsWithoutAddresses => Some(params.write_to_bytes()?),
    };
    command.arg(action);
    command::run(command, stdin, ACTION)
}

/// Extracts the socket's path from the output of `start`: a bare address, or JSON that contains it (containerd 2.x).
pub fn address(printed: &str) -> Result<PathBuf> {
    let address = match serde_json::from_str::<Value>(printed) {
        Ok(json) => json["address"].as_str().unwrap_or_default().to_owned(),
        Err(_) => printed.to_owned(),
    };
    match address.strip_prefix("unix://") {
        Some(path) => Ok(path.into()),
        None => bail!("`start` printed no socket address: {printed:?}"),
    }
}

/// Writes `bytes` to a stdin fifo from another thread and closes it.
pub fn feed(mut stdin: std::fs::File, bytes: Vec<u8>) {
    std::thread::spawn(move || drop(stdin.write_all(&bytes)));
}
