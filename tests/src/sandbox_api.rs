//! Calls of containerd's Sandbox API, and specs of containers in such sandboxes.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::ttrpc;
use husk_protos::cri::PodSandboxConfig;
use serde_json::{Value, json};

use crate::bundle;
use crate::shim::{Shim, Task};

const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";
/// The annotation with which the CRI plugin identifies a container's pod.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// Calls the Sandbox service.
pub fn call<Q: Message, A: Message>(shim: &Shim, method: &str, request: &Q) -> ttrpc::Result<A> {
    shim.task.call_service(SERVICE, method, request)
}

/// CreateSandbox, in a network namespace that CNI has made, or in none.
pub fn create(shim: &Shim, netns: &str, pod: &PodSandboxConfig) -> ttrpc::Result<api::CreateSandboxResponse> {
    let value = pod.write_to_bytes().map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    let options = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Default::default() };
    let request = api::CreateSandboxRequest {
        sandbox_id: shim.bundle.id.clone(),
        bundle_path: shim.bundle.path.display().to_string(),
        netns_path: netns.into(),
        options: MessageField::some(options),
        ..Default::default()
    };
    call(shim, "CreateSandbox", &request)
}

/// StartSandbox. Returns the sandbox's PID.
pub fn start(shim: &Shim) -> ttrpc::Result<u32> {
    start_with(&shim.task, &shim.bundle.id)
}

/// The same with a client of the caller's.
pub fn start_with(task: &Task, id: &str) -> ttrpc::Result<u32> {
    let request = api::StartSandboxRequest { sandbox_id: id.into(), ..Default::default() };
    let started: api::StartSandboxResponse = task.call_service(SERVICE, "StartSandbox", &request)?;
    Ok(started.pid)
}

/// ShutdownSandbox.
pub fn shutdown(shim: &Shim) -> ttrpc::Result<api::ShutdownSandboxResponse> {
    let request = api::ShutdownSandboxRequest { sandbox_id: shim.bundle.id.clone(), ..Default::default() };
    call(shim, "ShutdownSandbox", &request)
}

/// The spec of a container that joins the sandbox's namespaces by the PID that StartSandbox has reported.
pub fn member(sandbox: &str, id: &str, args: &[&str], pid: u32) -> Value {
    let mut spec = bundle::spec(id, args);
    spec["annotations"] = json!({ SANDBOX_ID: sandbox });
    let path = |kind: &str, name: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{name}")});
    spec["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "pid"}, path("network", "net"), path("ipc", "ipc"), path("uts", "uts"),
    ]);
    // Only the creator of a UTS namespace may set the host name.
    spec.as_object_mut().map(|spec| spec.remove("hostname"));
    spec
}
