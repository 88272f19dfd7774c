//! All that can be asked of a sandbox. How a method is added is told in [`super`].

use std::sync::Arc;

use super::{Kind, Method};
use crate::sandbox::Sandbox;

/// The methods of `ctl.sock`.
pub static METHODS: &[Method<Arc<Sandbox>>] = &[
    Method {
        name: "compute.vm.status",
        summary: "All that is known of this sandbox: its VM with the transitions and the boot's timeline, its health, its supervisor, its containers",
        params: &[],
        result: "an object; what is not known is null",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { sandbox.status() })),
    },
    Method {
        name: "compute.vm.list",
        summary: "This sandbox in short; each has a socket of its own, and `husk list` asks all of them",
        params: &[],
        result: "{sandboxes: [object]}, one of them",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { sandbox.listed() })),
    },
    Method {
        name: "compute.vm.create",
        summary: "Refused: containerd creates VMs",
        params: &[],
        result: "none",
        kind: Kind::Elsewhere(
            "containerd creates a VM with the first container of a sandbox: ctr run --runtime io.containerd.husk.v1 IMAGE ID, nerdctl run, or a pod",
        ),
    },
    Method {
        name: "compute.vm.start",
        summary: "Refused: containerd starts VMs",
        params: &[],
        result: "none",
        kind: Kind::Elsewhere("containerd starts a VM with the first container of a sandbox: ctr task start ID"),
    },
    Method {
        name: "compute.vm.stop",
        summary: "Refused: containerd stops VMs",
        params: &[],
        result: "none",
        kind: Kind::Elsewhere(
            "containerd stops a VM with the last container of a sandbox: ctr task kill --signal SIGTERM ID, then ctr task rm ID",
        ),
    },
    Method {
        name: "compute.vm.remove",
        summary: "Refused: containerd removes VMs",
        params: &[],
        result: "none",
        kind: Kind::Elsewhere(
            "containerd removes a VM with the last container of a sandbox: ctr task rm --force ID, then ctr container rm ID",
        ),
    },
];
