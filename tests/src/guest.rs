//! A VM with the real init and busybox, driven over vsock without a shim, for tests of the guest alone.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, DeleteResponse, StartRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use husk_protos::bundle::PutBundleRequest;
use husk_protos::bundle_ttrpc::BundleClient;
use husk_protos::debug::{Process, StartProcessRequest};
use husk_protos::debug_ttrpc::DebugClient;
use husk_protos::frame;
use husk_protos::network::{ConfigureNetworkRequest, NetworkAddress, NetworkLink, NetworkRoute};
use husk_protos::network_ttrpc::NetworkClient;
use husk_protos::stdio::{InputChunk, StreamKind, StreamRequest};
use husk_protos::stdio_ttrpc::StdioClient;
use husk_protos::system::{Hello, InfoRequest, InfoResponse};
use husk_protos::system_ttrpc::SystemClient;
use husk_protos::{PORT_READY, PORT_STDIO, PORT_TASK};
use husk_vsock::{Device, Listener};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{self, Context as CallContext};

use crate::artifacts::repository;
use crate::vm::{InitramfsFile, MachineType, Vm, VmConfig};

/// Deadline for a single step of a test, on a loaded machine that emulates its guest.
pub const STEP: Duration = Duration::from_secs(120);

/// Only one VM at a time: one emulated VM keeps a machine with two processors busy.
static VM_LOCK: Mutex<()> = Mutex::const_new(());

/// A guest that has sent its hello.
pub struct Guest {
    /// The host's side of the vsock device.
    pub device: Device,
    /// The VM itself: its console, and its exit.
    pub vm: Vm,
    /// The guest's first message.
    pub hello: Hello,
    /// The Task service.
    pub task: TaskClient,
    /// The Bundle service.
    pub bundle: BundleClient,
    /// The System service.
    pub system: SystemClient,
    /// The Network service.
    pub network: NetworkClient,
    /// The Debug service, which works in debug mode only.
    pub debug: DebugClient,
    /// The guest closes this connection when it ends.
    pub ready: UnixStream,
    _listener: Listener,
    _vm_lock: MutexGuard<'static, ()>,
}

/// The VM that [`Guest::boot`] boots: `out/husk-init`, and a busybox tree at `/rootfs`.
pub fn config() -> Result<VmConfig> {
    let init = repository().join("out/husk-init");
    ensure!(init.is_file(), "there is no init at {}: build it first", init.display());
    let output = Command::new(repository().join("rootfs/busybox")).output().context("run rootfs/busybox")?;
    ensure!(output.status.success(), "rootfs/busybox: {}", String::from_utf8_lossy(&output.stderr));
    let busybox = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    let content = std::fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?;

    let mut files = vec![InitramfsFile { path: "rootfs/bin/busybox".into(), content, link: false }];
    for applet in [
        "sh", "true", "cat", "echo", "sleep", "grep", "id", "dd", "head", "ls", "mknod", "hostname", "wc", "kill",
        "yes", "tty", "ps", "stty",
    ] {
        files.push(InitramfsFile { path: format!("rootfs/bin/{applet}"), content: b"busybox".into(), link: true });
    }
    for folder in ["proc", "sys", "dev", "tmp", "run"] {
        files.push(InitramfsFile { path: format!("rootfs/{folder}/.keep"), content: Vec::new(), link: false });
    }
    Ok(VmConfig { files, memory: 512, ..VmConfig::bare(MachineType::Microvm, &init) })
}

/// [`config`] in debug mode: with the files of the debug initramfs and the kernel parameters that enable it.
pub fn debug_config() -> Result<VmConfig> {
    let mut config = config()?;
    let rootfs = config.files.iter().filter_map(|file| {
        let path = file.path.strip_prefix("rootfs/").filter(|path| path.starts_with("bin/"))?.to_owned();
        Some(InitramfsFile { path, ..file.clone() })
    });
    let debug_files: Vec<InitramfsFile> = rootfs.collect();
    config.files.extend(debug_files);
    config.kernel_parameters = "husk.debug=1 husk.log=debug".into();
    config.shell = true;
    Ok(config)
}

/// How often [`Guest::cost_of_configuring`] asks for the time that PID 1 has used, before and after.
const REPORTS: usize = 8;
/// The MAC of the network card in [`Guest::cost_of_configuring`].
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// The network of a usual pod: one link with an IPv4 and an IPv6 address and their default routes.
pub fn pod_network(mac: &[u8], own: Ipv4Addr, gateway: Ipv4Addr) -> ConfigureNetworkRequest {
    const AF_INET: u32 = libc::AF_INET as u32;
    const AF_INET6: u32 = libc::AF_INET6 as u32;
    /// IFA_F_NODAD of linux/if_addr.h.
    const NODAD: u32 = 2;
    let v6 = |last: u16| Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0, last).octets().to_vec();
    let address =
        |local: Vec<u8>, prefix_length, flags| NetworkAddress { local, prefix_length, flags, ..Default::default() };
    let route = |family, gateway| NetworkRoute { family, link: "eth0".into(), gateway, ..Default::default() };
    let link = NetworkLink {
        name: "eth0".into(),
        mac: mac.to_vec(),
        mtu: 1500,
        up: true,
        addresses: vec![address(own.octets().to_vec(), 16, 0), address(v6(7), 64, NODAD)],
        ..Default::default()
    };
    let routes = vec![route(AF_INET, gateway.octets().to_vec()), route(AF_INET6, v6(1))];
    ConfigureNetworkRequest { links: vec![link], routes, ..Default::default() }
}

/// A spec for these arguments, as `ctr run` writes it.
pub fn spec(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SYS_CHROOT",
        "CAP_MKNOD",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "/rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/c",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A ttrpc context with the deadline of one step.
pub fn call() -> CallContext {
    context::with_duration(STEP)
}

impl Guest {
    /// Boots the default guest.
    pub async fn boot() -> Result<Guest> {
        Self::boot_with(config()?).await
    }

    /// Boots a guest with this configuration.
    pub async fn boot_with(config: VmConfig) -> Result<Guest> {
        let vm_lock = VM_LOCK.lock().await;
        let (device, qemus_end) = Device::start(3)?;
        let mut listener = device.listen(PORT_READY)?;
        let vm = Vm::boot_with(&config, qemus_end)?;
        let mut ready = match timeout(STEP, listener.accept()).await {
            Ok(Ok(ready)) => ready,
            other => bail!("the guest did not boot ({other:?}); console:\n{}", vm.console()),
        };
        let hello: Hello = timeout(STEP, frame::read(&mut ready)).await.context("the guest did not send a hello")??;
        let client = client(&device, &hello, PORT_TASK).await?;
        Ok(Guest {
            task: TaskClient::new(client.clone()),
            bundle: BundleClient::new(client.clone()),
            system: SystemClient::new(client.clone()),
            network: NetworkClient::new(client.clone()),
            debug: DebugClient::new(client),
            device,
            vm,
            hello,
            ready,
            _listener: listener,
            _vm_lock: vm_lock,
        })
    }

    /// Connects to a port, for one stream or many calls.
    pub async fn connect(&self, port: u32) -> Result<Client> {
        client(&self.device, &self.hello, port).await
    }

    /// Sends a bundle and creates its container. `streams` contains the letters (i, o, e) of its standard streams.
    pub async fn create(&self, id: &str, spec: &Value, streams: &str) -> Result<u32> {
        let put = PutBundleRequest { id: id.into(), spec: serde_json::to_vec(spec)?, ..Default::default() };
        let bundle = self.bundle.put(call(), &put).await.context("put the bundle")?.path;
        let stream = |letter| if streams.contains(letter) { "stream".to_owned() } else { String::new() };
        let (stdin, stdout, stderr) = (stream('i'), stream('o'), stream('e'));
        let request = CreateTaskRequest { id: id.into(), bundle, stdin, stdout, stderr, ..Default::default() };
        Ok(self.task.create(call(), &request).await?.pid)
    }

    /// Starts a container or an exec.
    pub async fn start(&self, id: &str, exec: &str) -> Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.start(call(), &request).await?.pid)
    }

    /// Waits for a process's exit status.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.wait(call(), &request).await?.exit_status)
    }

    /// Deletes a process.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() };
        Ok(self.task.delete(call(), &request).await?)
    }

    /// Runs a container until it exits, deletes it, and returns its status and output.
    pub async fn run(&self, id: &str, spec: &Value) -> Result<(u32, String)> {
        let ended = self.run_to_its_end(id, spec).await?;
        self.delete(id, "").await?;
        Ok(ended)
    }

    /// Runs a container until it exits, and returns its status and output.
    pub async fn run_to_its_end(&self, id: &str, spec: &Value) -> Result<(u32, String)> {
        self.create(id, spec, "oe").await?;
        let output = async { tokio::try_join!(self.output(id, "", false), self.output(id, "", true)) };
        let ((stdout, stderr), status) = tokio::try_join!(output, async {
            self.start(id, "").await?;
            self.wait(id, "").await
        })?;
        Ok((status, String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned()))
    }

    /// Everything that a process writes to its stdout or stderr.
    pub async fn output(&self, id: &str, exec: &str, stderr: bool) -> Result<Vec<u8>> {
        let kind = if stderr { StreamKind::STREAM_KIND_STDERR } else { StreamKind::STREAM_KIND_STDOUT };
        let request =
            StreamRequest { container_id: id.into(), exec_id: exec.into(), kind: kind.into(), ..Default::default() };
        let client = StdioClient::new(self.connect(PORT_STDIO).await?);
        let mut stream = client.output(context::with_timeout(0), &request).await?;
        let mut all = Vec::new();
        while let Some(chunk) = timeout(STEP, stream.recv()).await.context("no output")?? {
            all.extend(chunk.data);
        }
        Ok(all)
    }

    /// Writes to a process's stdin and closes it. Returns the number of bytes that reached the process.
    pub async fn input(&self, id: &str, exec: &str, data: &[u8]) -> Result<u64> {
        let client = StdioClient::new(self.connect(PORT_STDIO).await?);
        let mut stream = client.input(context::with_timeout(0)).await?;
        let name = InputChunk { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        stream.send(&name).await?;
        for part in data.chunks(husk_protos::STDIO_CHUNK) {
            // The process may close its end early; the response contains what it received.
            if stream.send(&InputChunk { data: part.into(), ..Default::default() }).await.is_err() {
                break;
            }
        }
        Ok(timeout(STEP, stream.close_and_recv()).await.context("no response to the input")??.written)
    }

    /// Starts a process in the guest itself, without a terminal, and returns its id.
    pub async fn start_in_vm(&self, args: &[&str], stdin: bool) -> Result<String> {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let request = StartProcessRequest { args, stdin, ..Default::default() };
        Ok(self.debug.start(call(), &request).await?.id)
    }

    /// Waits for the exit status of a process in the guest itself.
    pub async fn wait_in_vm(&self, id: &str) -> Result<u32> {
        Ok(self.debug.wait(call(), &Process { id: id.into(), ..Default::default() }).await?.exit_status)
    }

    /// Removes a process of the guest itself, and kills it if it runs.
    pub async fn end_in_vm(&self, id: &str) -> Result<()> {
        self.debug.end(call(), &Process { id: id.into(), ..Default::default() }).await?;
        Ok(())
    }

    /// Runs a process in the guest itself until it exits and returns its status, stdout and stderr.
    pub async fn run_in_vm(&self, args: &[&str], stdin: Option<&[u8]>) -> Result<(u32, Vec<u8>, Vec<u8>)> {
        let id = self.start_in_vm(args, stdin.is_some()).await?;
        let input = async {
            match stdin {
                Some(data) => self.input("", &id, data).await.map(drop),
                None => Ok(()),
            }
        };
        let output = async { tokio::try_join!(self.output("", &id, false), self.output("", &id, true)) };
        let ((), (stdout, stderr), status) = tokio::try_join!(input, output, self.wait_in_vm(&id))?;
        self.end_in_vm(&id).await?;
        Ok((status, stdout, stderr))
    }

    /// Calls the guest's `Info`.
    pub async fn info(&self) -> Result<InfoResponse> {
        Ok(self.system.info(call(), &InfoRequest::new()).await?)
    }

    /// Configures the network of a usual pod on the NIC [`MAC`] and returns the instructions that PID 1 executes for it.
    /// The guest needs an instruction clock.
    pub async fn cost_of_configuring(&self) -> Result<u64> {
        let request = pod_network(&MAC, Ipv4Addr::new(10, 88, 0, 7), Ipv4Addr::new(10, 88, 0, 1));
        // A report costs as much. Its own cost is counted in this or in the next one, so there are several.
        let (before, from) = (self.info().await?, self.reports(REPORTS).await?);
        self.network.configure(call(), &request).await.context("configure the network")?;
        let to = self.reports(REPORTS).await?;
        let reports = from.init_cpu_usec - before.init_cpu_usec;
        // A microsecond is a thousand instructions.
        Ok((to.init_cpu_usec - from.init_cpu_usec).saturating_sub(reports) * 1000)
    }

    /// Calls the guest's `Info` so many times and returns its last answer.
    async fn reports(&self, times: usize) -> Result<InfoResponse> {
        for _ in 1..times {
            self.info().await?;
        }
        self.info().await
    }

    /// Ends the VM without a word to the guest, as the shim does with the last container, and waits until QEMU has exited.
    pub async fn quit(mut self) -> Result<()> {
        tokio::task::spawn_blocking(move || {
            self.vm.qmp(&["quit"])?;
            self.vm.wait(STEP)
        })
        .await?
    }

    /// Shuts the guest down and waits until QEMU has exited.
    pub async fn shut_down(mut self) -> Result<String> {
        // The response races with the guest's end: a closed connection is as good.
        let response = self.task.shutdown(call(), &Default::default()).await;
        if let Err(ttrpc::Error::RpcStatus(status)) = response {
            bail!("shutdown failed: {status}");
        }
        let console = self.vm.console();
        tokio::task::spawn_blocking(move || self.vm.wait(STEP)).await??;
        Ok(console)
    }
}

async fn client(device: &Device, hello: &Hello, port: u32) -> Result<Client> {
    let mut stream = device.connect(port, STEP).await?;
    stream.write_all(&hello.secret).await.context("send the guest's secret")?;
    Ok(Client::new(Socket::new(stream)))
}
