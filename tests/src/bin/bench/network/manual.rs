//! The reference: a VM with the same QEMU, kernel and initramfs as husk's, connected by commands that a person would
//! type.

use std::fs;

use anyhow::{Context, Result};
use husk_tests::cgroup;
use husk_tests::cni::Pod;
use husk_tests::guest::{Guest, call, debug_config, pod_network};
use husk_tests::vm::{InitramfsFile, VmConfig};

use super::contender::{GATEWAY, Tools};

/// Joins the pod's link and a tap.
const CONNECT: &str = "ip netns exec $pod ip tuntap add dev tap0 mode tap vnet_hdr
ip -n $pod link set tap0 mtu 1500 up
join() {
    tc -n $pod qdisc add dev $1 ingress
    tc -n $pod filter add dev $1 parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev $2
}
join eth0 tap0; join tap0 eth0";

/// Boots the VM in the pod. It gets the CPU and the kernel parameters of the VM of the container `model`, and its
/// cgroup: on a loaded machine, a process in the root cgroup gets more of the processors.
pub(super) async fn boot(pod: &Pod<'_>, tools: &Tools, model: &str) -> Result<Guest> {
    let mac = pod.sh("ip netns exec $pod cat /sys/class/net/eth0/address")?;
    let addresses = pod.addresses(0)?;
    let address = addresses.first().context("the pod has no address")?.parse()?;
    pod.sh(CONNECT)?;
    let containerd = pod.containerd();
    let qemu = containerd.qemu_of(model)?.pid;
    let command = fs::read(format!("/proc/{qemu}/cmdline")).context("read the command line of husk's QEMU")?;
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let value = |option: &str| {
        let value = words.windows(2).find(|pair| pair[0] == option).map(|pair| pair[1].to_string());
        value.with_context(|| format!("husk's QEMU has no {option}"))
    };
    let mut files = debug_config()?.files;
    for entry in fs::read_dir(&tools.iperf3).with_context(|| format!("list {}", tools.iperf3.display()))? {
        let entry = entry?;
        let path = format!("iperf3/{}", entry.file_name().to_string_lossy());
        files.push(InitramfsFile { path, content: fs::read(entry.path())?, link: false });
    }
    files.push(InitramfsFile { path: "probe/probe".into(), content: fs::read(&tools.probe)?, link: false });
    // iperf3 keeps its buffers in files there.
    files.push(InitramfsFile { path: "tmp/.keep".into(), content: Vec::new(), link: false });
    let nic = format!("virtio-net-device,netdev=n0,mac={mac}");
    let qemu_arguments = [
        ["-cpu", &value("-cpu")?],
        ["-smp", &value("-smp")?],
        ["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no,vhost=off"],
        ["-device", &nic],
    ];
    let config = VmConfig {
        files,
        // In debug mode, programs run in the guest itself.
        kernel_parameters: format!("{} husk.debug=1", value("-append")?),
        qemu_arguments: qemu_arguments.concat().into_iter().map(str::to_owned).collect(),
        network_namespace: Some(containerd.path(pod.netns())),
        ..debug_config()?
    };
    let guest = Guest::boot_with(config).await?;
    for folder in cgroup::find(model) {
        let procs = folder.join("cgroup.procs");
        fs::write(&procs, guest.vm.pid().to_string()).with_context(|| format!("write to {}", procs.display()))?;
    }
    let network = pod_network(&bytes(&mac)?, address, GATEWAY.parse()?);
    guest.network.configure(call(), &network).await.context("configure the guest's network")?;
    Ok(guest)
}

fn bytes(text: &str) -> Result<Vec<u8>> {
    let byte = |digits| u8::from_str_radix(digits, 16).with_context(|| format!("{text} is no MAC"));
    text.split(':').map(byte).collect()
}
