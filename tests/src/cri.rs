//! Kubernetes' Container Runtime Interface of a private containerd: pods as the kubelet runs them.
//!
//! The CRI is gRPC, which is HTTP/2 with length-prefixed messages: a client for calls with one response fits into this
//! file, and measures without the start of another program.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use containerd_shim_protos::protobuf::{Message, MessageField};
use h2::client::SendRequest;
use husk_protos::cri;
use tokio::net::UnixStream;
use tokio::runtime::Runtime as Executor;

use crate::artifacts::{Runtime, Version, built};
use crate::cni::Plugins;
use crate::containerd::{Containerd, Setup};

/// Deadline for one call: RunPodSandbox boots a VM without an accelerator.
const CALL: Duration = Duration::from_secs(90);
/// The containerd namespace of the CRI plugin.
const NAMESPACE: &str = "k8s.io";
/// The images of pods: the containers', and that of the pause container.
const IMAGE: &str = "docker.io/library/husk-busybox:latest";
const PAUSE: &str = "docker.io/library/husk-pause:latest";
/// The folder of the CNI configuration, in the daemon's /run.
const CNI: &str = "/run/cni";
/// The pods' network: a bridge in the daemon's network namespace.
const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0",
"isGateway": true, "ipam": {"type": "host-local", "dataDir": "/run/cni/leases",
"ranges": [[{"subnet": "10.89.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

/// How pods run. The value of `runtimeClassName`'s handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// runc, with a pause container.
    Runc,
    /// husk, with a pause container (`sandboxer = "podsandbox"`).
    Husk,
    /// husk under containerd's Sandbox API (`sandboxer = "shim"`).
    HuskShim,
}

impl Handler {
    /// All of them, the reference first.
    pub const ALL: [Self; 3] = [Self::Runc, Self::Husk, Self::HuskShim];

    /// Its name in containerd's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Husk => "husk",
            Self::HuskShim => "husk-shim",
        }
    }
}

/// A containerd that serves the CRI, and a client.
pub struct Cri {
    /// The daemon.
    pub containerd: Containerd,
    executor: Executor,
    sender: SendRequest<Bytes>,
}

/// A running pod. It is stopped and removed on drop.
pub struct Pod<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
    config: cri::PodSandboxConfig,
}

/// A running container of a pod.
pub struct PodContainer<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
}

impl Cri {
    /// Starts the newest containerd with all handlers. `options` are the lines of the section with husk's options.
    pub fn start(options: &str) -> Result<Self> {
        let mut config = format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\nrestrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"{}\"\nconf_dir = \"{CNI}\"\n",
            Plugins::newest()?.folder.display()
        );
        for handler in Handler::ALL {
            let section = format!("plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{}", handler.name());
            let runtime = if handler == Handler::Runc { Runtime::Runc } else { Runtime::Husk };
            let sandboxer = if handler == Handler::HuskShim { "shim" } else { "podsandbox" };
            config += &format!(
                "[{section}]\nruntime_type = \"{}\"\nsandboxer = \"{sandboxer}\"\npod_annotations = [\"io.husk.*\"]\n",
                runtime.name()
            );
            if handler != Handler::Runc && !options.is_empty() {
                config += &format!("[{section}.options]\n{options}\n");
            }
        }
        let setup =
            Setup { version: Some(Version::V2_4), runtime: Some(Runtime::Husk), config, cri: true, ..Setup::default() };
        let containerd = Containerd::with(setup)?;
        std::fs::create_dir_all(containerd.path(CNI))?;
        std::fs::write(containerd.path(CNI).join("10-pods.conflist"), NETWORK)?;
        for image in ["busybox", "pause"] {
            let tarball = built(&format!("images/{image}.tar"))?;
            containerd.ctr(["--namespace", NAMESPACE, "image", "import"]).arg(tarball.display()).ok()?;
        }
        let executor = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let socket = containerd.path("/run/containerd/containerd.sock");
        let sender = executor.block_on(connect(&socket)).context("connect to containerd's gRPC socket")?;
        Ok(Self { containerd, executor, sender })
    }

    /// Calls a method of the RuntimeService.
    pub fn call<Q: Message, A: Message>(&self, method: &str, request: &Q) -> Result<A> {
        let call = async { tokio::time::timeout(CALL, self.exchange(method, request.write_to_bytes()?)).await? };
        let response = self.executor.block_on(call).with_context(|| method.to_owned())?;
        Ok(A::parse_from_bytes(&response)?)
    }

    async fn exchange(&self, method: &str, message: Vec<u8>) -> Result<Vec<u8>> {
        let request = http::Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut body) = self.sender.clone().ready().await?.send_request(request, false)?;
        // No compression, and the length.
        let mut frame = vec![0];
        frame.extend(u32::try_from(message.len())?.to_be_bytes());
        frame.extend(message);
        body.send_data(frame.into(), true)?;
        let response = response.await?;
        let headers = response.headers().clone();
        let mut body = response.into_body();
        let mut received = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            received.extend_from_slice(&chunk);
            body.flow_control().release_capacity(chunk.len())?;
        }
        let trailers = body.trailers().await?.unwrap_or(headers);
        let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        ensure!(text("grpc-status") == "0", "{} (code {})", text("grpc-message"), text("grpc-status"));
        match received.split_at_checked(5) {
            Some((_, message)) => Ok(message.to_owned()),
            None => bail!("no message in {received:?}"),
        }
    }

    /// RunPodSandbox. The pod's name is unique.
    pub fn pod(&self, handler: Handler, mut config: cri::PodSandboxConfig) -> Result<Pod<'_>> {
        let name = self.containerd.id("pod");
        config.metadata = MessageField::some(cri::PodSandboxMetadata {
            name: name.clone(),
            uid: name,
            namespace: "default".into(),
            ..Default::default()
        });
        let request = cri::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.name().into(),
            ..Default::default()
        };
        let response: cri::PodSandboxId = self.call("RunPodSandbox", &request)?;
        Ok(Pod { cri: self, id: response.pod_sandbox_id, config })
    }
}

/// Connects, and drives the connection in a task of its own.
async fn connect(socket: &Path) -> Result<SendRequest<Bytes>> {
    let (sender, connection) = h2::client::handshake(UnixStream::connect(socket).await?).await?;
    tokio::spawn(connection);
    Ok(sender)
}

impl Pod<'_> {
    fn request(&self) -> cri::PodSandboxId {
        cri::PodSandboxId { pod_sandbox_id: self.id.clone(), ..Default::default() }
    }

    /// CreateContainer and StartContainer.
    pub fn container(&self, name: &str, command: &[&str]) -> Result<PodContainer<'_>> {
        let metadata = cri::ContainerMetadata { name: name.into(), ..Default::default() };
        let config = cri::ContainerConfig {
            metadata: MessageField::some(metadata),
            image: MessageField::some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..Default::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        let id: cri::ContainerId = self.cri.call("CreateContainer", &request)?;
        let _: cri::Empty = self.cri.call("StartContainer", &id)?;
        Ok(PodContainer { cri: self.cri, id: id.container_id })
    }

    /// PodSandboxStatus: whether the pod is ready, and its address.
    pub fn status(&self) -> Result<(bool, String)> {
        let response: cri::PodSandboxStatusResponse = self.cri.call("PodSandboxStatus", &self.request())?;
        Ok((response.status.state == 0, response.status.network.ip.clone()))
    }

    /// UpdatePodSandboxResources.
    pub fn update(&self, resources: cri::LinuxContainerResources) -> Result<()> {
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: self.id.clone(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.cri.call("UpdatePodSandboxResources", &request).map(|_: cri::Empty| ())
    }

    /// StopPodSandbox.
    pub fn stop(&self) -> Result<()> {
        self.cri.call("StopPodSandbox", &self.request()).map(|_: cri::Empty| ())
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub fn remove(&self) -> Result<()> {
        self.stop()?;
        self.cri.call("RemovePodSandbox", &self.request()).map(|_: cri::Empty| ())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Both succeed for a pod that the test has removed.
        let _ = self.remove();
    }
}

impl PodContainer<'_> {
    /// ExecSync of a shell script, which must succeed. Returns its output.
    pub fn script(&self, script: &str) -> Result<String> {
        let request = cri::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: ["sh", "-c", script].map(str::to_owned).into(),
            timeout: 60,
            ..Default::default()
        };
        let response: cri::ExecSyncResponse = self.cri.call("ExecSync", &request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        ensure!(response.exit_code == 0, "{script}: {} {}", response.exit_code, text(&response.stderr));
        Ok(text(&response.stdout))
    }
}
