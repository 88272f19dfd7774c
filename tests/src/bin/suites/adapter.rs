//! A runtime's command line, as the OCI runtime-tools call it, over a containerd shim: `create`, `start`, `state`, `kill`
//! and `delete`, each of which is one run of this program. The shim is driven as containerd drives it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use containerd_shim_protos::api::{self, Status};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use husk_tests::command;
use husk_tests::fifo;
use husk_tests::shim::{Api, Task, address};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::place::Place;

/// Environment: the shim's binary.
pub const SHIM: &str = "HUSK_SUITES_SHIM";
/// Environment: containerd's binary, with which older shims publish events.
pub const PUBLISHER: &str = "HUSK_SUITES_PUBLISHER";

const NAMESPACE: &str = "suites";
/// Of the containerd in whose namespaces this program runs.
const CONTAINERD: &str = "/run/containerd/containerd.sock";
/// One file per container: its bundle and its shim's socket.
const STATE: &str = "/run/suites";
/// The shims' logs, until the place ends.
const LOGS: &str = "/run/suites-logs";
/// Limit for the part of a shim's log that is kept.
const MAX_LOG: usize = 256 * 1024;
/// Deadline for the shim's `start` and `delete`, and for its exit.
const ACTION: Duration = Duration::from_secs(30);
/// What a shim writes into the bundle, which containerd would remove as a whole.
const SHIMS_FILES: [&str; 2] = ["address", "log"];

/// The actions.
pub const ACTIONS: [&str; 5] = ["create", "start", "state", "kill", "delete"];

/// Runs one action.
pub fn main(action: &str, words: &[String]) -> Result<()> {
    let mut words = words.iter();
    let (mut bundle, mut pid_file, mut rest) = (PathBuf::from("."), None, Vec::new());
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--bundle" => bundle = value()?.into(),
            "--pid-file" => pid_file = Some(PathBuf::from(value()?)),
            _ if word.starts_with('-') => bail!("unknown argument {word}"),
            _ => rest.push(word.as_str()),
        }
    }
    let id = *rest.first().with_context(|| format!("{action} needs a container id"))?;
    match action {
        "create" => create(id, &bundle.canonicalize().context("the bundle")?, pid_file.as_deref()),
        "start" => Container::load(id)?.task()?.start(id, "").map(drop).map_err(described),
        "state" => {
            let state = Container::load(id)?.state()?;
            Ok(writeln!(std::io::stdout(), "{state}")?)
        }
        "kill" => kill(id, rest.get(1).copied().unwrap_or("TERM")),
        "delete" => delete(id),
        _ => bail!("unknown action {action}"),
    }
}

/// Removes the logs of the shims from a place and returns their text.
pub fn take_logs(place: &Place) -> Result<String> {
    let folder = place.containerd.path(LOGS);
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(String::new()) };
    let mut text = String::new();
    for entry in entries {
        let path = entry?.path();
        let log = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let end = String::from_utf8_lossy(&log[log.len().saturating_sub(MAX_LOG)..]).into_owned();
        text += &format!("--- shim of {} ---\n{end}", path.file_name().unwrap_or_default().to_string_lossy());
    }
    fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    Ok(text)
}

/// A container that has been created.
struct Container {
    id: String,
    bundle: PathBuf,
    socket: PathBuf,
}

impl Container {
    fn file(id: &str) -> Result<PathBuf> {
        ensure!(!id.is_empty() && !id.contains('/'), "bad container id {id:?}");
        Ok(Path::new(STATE).join(id))
    }

    fn load(id: &str) -> Result<Self> {
        let text = fs::read_to_string(Self::file(id)?).map_err(|e| anyhow!("no container {id}: {e}"))?;
        let (bundle, socket) = text.split_once('\n').context("damaged state")?;
        Ok(Self { id: id.into(), bundle: bundle.into(), socket: socket.into() })
    }

    fn save(&self) -> Result<()> {
        fs::create_dir_all(STATE)?;
        Ok(fs::write(Self::file(&self.id)?, format!("{}\n{}", self.bundle.display(), self.socket.display()))?)
    }

    fn task(&self) -> Result<Task> {
        Task::connect(&self.socket, Api::V3)
    }

    /// The state as the runtime specification defines it.
    fn state(&self) -> Result<Value> {
        let task = self.task()?;
        let state = task.state(&self.id, "").map_err(described)?;
        let status = match state.status.enum_value() {
            Ok(Status::CREATED) => "created",
            Ok(Status::RUNNING) => "running",
            Ok(Status::STOPPED) => "stopped",
            other => bail!("{} is {other:?}", self.id),
        };
        if status == "stopped" {
            // The shim reports the exit when the output is complete.
            task.wait(&self.id, "").map_err(described)?;
        }
        let bundle = self.bundle.display().to_string();
        Ok(json!({"ociVersion": "1.0.2", "id": self.id, "status": status, "pid": state.pid, "bundle": bundle}))
    }
}

fn create(id: &str, bundle: &Path, pid_file: Option<&Path>) -> Result<()> {
    ensure!(!Container::file(id)?.exists(), "container {id} exists");
    ensure!(bundle.join("config.json").exists(), "{} has no config.json", bundle.display());
    // While this process holds both ends of the log, neither the shim nor its reader waits for the other.
    let log = bundle.join("log");
    fifo::make(&log)?;
    let _held = OpenOptions::new().read(true).write(true).open(&log)?;
    fs::create_dir_all(LOGS)?;
    let mut reader = Command::new("cat");
    reader.stdin(File::open(&log)?).stdout(File::create(Path::new(LOGS).join(id))?).stderr(Stdio::null());
    reader.spawn().context("read the shim's log")?;

    let created = started(id, bundle).and_then(|container| match request(&container) {
        Ok(pid) => Ok((container, pid)),
        Err(error) => {
            // As containerd does after a failed Create.
            if let Ok(task) = container.task() {
                let _ = task.shutdown(id, true);
            }
            Err(error)
        }
    });
    let (container, pid) = match created {
        Ok(created) => created,
        Err(error) => {
            action(id, bundle, "delete").and_then(command::Output::ok).with_context(|| format!("after: {error:#}"))?;
            forget(bundle);
            return Err(error);
        }
    };
    container.save()?;
    if let Some(file) = pid_file {
        fs::write(file, pid.to_string())?;
    }
    Ok(())
}

/// Starts a shim.
fn started(id: &str, bundle: &Path) -> Result<Container> {
    let output = action(id, bundle, "start")?.ok()?;
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).context("the shim's answer to `start`")?;
    Ok(Container { id: id.into(), bundle: bundle.into(), socket: address(&answer.address)? })
}

/// Has the shim create the container. Its streams are those of this process.
fn request(container: &Container) -> Result<u32> {
    let stream = |number: u32| match fs::read_link(format!("/proc/self/fd/{number}")) {
        Ok(path) if path.is_file() => format!("file://{}", path.display()),
        _ => String::new(),
    };
    let request = api::CreateTaskRequest {
        id: container.id.clone(),
        bundle: container.bundle.display().to_string(),
        stdout: stream(1),
        stderr: stream(2),
        ..Default::default()
    };
    let created: Result<api::CreateTaskResponse> = container.task()?.call("Create", &request).map_err(described);
    Ok(created?.pid)
}

fn kill(id: &str, signal: &str) -> Result<()> {
    let name = if signal.starts_with("SIG") { signal.to_owned() } else { format!("SIG{signal}") };
    let number = match signal.parse::<u32>() {
        Ok(number) => number,
        Err(_) => Signal::from_str(&name).with_context(|| format!("signal {signal:?}"))? as u32,
    };
    Container::load(id)?.task()?.kill(id, "", number).map_err(described)
}

fn delete(id: &str) -> Result<()> {
    let container = Container::load(id)?;
    let task = container.task()?;
    task.delete(id, "").map_err(described)?;
    // The shim may exit before its response is sent.
    let _ = task.shutdown(id, false);
    command::wait_for(ACTION, "the shim exits", || Task::connect(&container.socket, Api::V3).is_err().then_some(()))?;
    fs::remove_file(Container::file(id)?)?;
    forget(&container.bundle);
    Ok(())
}

fn forget(bundle: &Path) {
    for file in SHIMS_FILES {
        // Some shims remove their own.
        let _ = fs::remove_file(bundle.join(file));
    }
}

/// Runs the shim's binary with an action, as containerd does.
fn action(id: &str, bundle: &Path, action: &str) -> Result<command::Output> {
    let shim = std::env::var_os(SHIM).with_context(|| format!("{SHIM} is not set"))?;
    let publisher = std::env::var_os(PUBLISHER).with_context(|| format!("{PUBLISHER} is not set"))?;
    let mut command = Command::new(shim);
    command.current_dir(bundle);
    command.args(["-namespace", NAMESPACE, "-id", id, "-address", CONTAINERD, "-publish-binary"]).arg(&publisher);
    if action == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    // runc's shim takes this address from the environment only.
    command.env("TTRPC_ADDRESS", format!("{CONTAINERD}.ttrpc")).arg(action);
    let params = BootstrapParams {
        instance_id: id.into(),
        namespace: NAMESPACE.into(),
        containerd_version: "2.4.2".into(),
        containerd_ttrpc_address: format!("{CONTAINERD}.ttrpc"),
        containerd_grpc_address: CONTAINERD.into(),
        containerd_binary: publisher.to_string_lossy().into_owned(),
        ..Default::default()
    };
    command::run(command, Some(params.write_to_bytes()?), ACTION)
}

/// An error of a call, as a command line prints it.
fn described(error: containerd_shim_protos::ttrpc::Error) -> anyhow::Error {
    match error {
        containerd_shim_protos::ttrpc::Error::RpcStatus(status) => anyhow!(status.message),
        other => other.into(),
    }
}
