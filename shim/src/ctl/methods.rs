//! The methods of a sandbox. The folder's `mod.rs` explains how to add one.

use std::sync::Arc;

use husk_protos::chain::Chain;
use serde::Serialize;

use crate::ctl::method::{Answer, Kind, Method, Param};
use crate::ctl::rpc::RpcError;
use crate::ctl::{events, exec, logs, rpc};
use crate::sandbox::{Sandbox, StatusError};

fn answer<T: Serialize>(result: Result<T, StatusError>) -> Answer {
    result.map_err(|error| RpcError::refused(Chain(&error).to_string())).and_then(rpc::result)
}

/// The methods of `ctl.sock`.
pub(crate) static METHODS: &[Method<Arc<Sandbox>>] = &[
    Method {
        name: "compute.vm.status",
        summary: "Returns everything that is known about this sandbox: its VM with state changes and boot timeline, \
            its health, supervisor, network and containers",
        params: &[],
        result: "an object; unknown values are null",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { answer(sandbox.status().await) })),
    },
    Method {
        name: "compute.vm.list",
        summary: "Returns a summary of this sandbox. Each sandbox has its own socket; `husk list` queries all of them",
        params: &[],
        result: "{sandboxes: [object]}, with one entry",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { answer(sandbox.list()) })),
    },
    Method {
        name: "compute.vm.events.tail",
        summary: "Sends the latest events of this sandbox: state changes of its VM, task events sent to containerd, \
            health, supervisor",
        params: &[
            Param {
                name: "after",
                kind: "integer",
                required: false,
                summary: "the number of the last event that the caller has received; 0 for none",
            },
            Param {
                name: "follow",
                kind: "boolean",
                required: false,
                summary: "also send future events, until the caller closes its side of the connection",
            },
        ],
        result: "{last: number of the last event, ended: whether the sandbox has ended}",
        kind: Kind::Streaming {
            notifications: "{events: [{number, at_ms, kind, what, fields}], forgotten: number of earlier events that \
                have been discarded}",
            run: |sandbox, call| Box::pin(events::tail(sandbox, call)),
        },
    },
    Method {
        name: "compute.vm.logs",
        summary: "Sends the guest's console output and the log of its init",
        params: &[
            Param { name: "source", kind: "string", required: false, summary: "console or init; both by default" },
            Param { name: "lines", kind: "integer", required: false, summary: "only this many last lines of each log" },
            Param {
                name: "follow",
                kind: "boolean",
                required: false,
                summary: "also send future lines, until the caller closes its side of the connection",
            },
        ],
        result: "{ended: whether the sandbox has ended}",
        kind: Kind::Streaming {
            notifications: "{source, lines: [string]}, including control characters as the guest wrote them; or \
                {source, missed: bytes lost because the caller reads too slowly}",
            run: |sandbox, call| Box::pin(logs::run(sandbox, call)),
        },
    },
    Method {
        name: "compute.vm.console.endpoint",
        summary: "Returns the unix socket that serves the guest's console. A client receives the last 64 KiB of \
            output, then new output; what it sends is typed on the console",
        params: &[],
        result: "{path, log, machine: unused, up or ended, replay_bytes}",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { rpc::result(sandbox.guest_logs().console.endpoint()) })),
    },
    Method {
        name: "compute.vm.exec",
        summary: "Runs a process in the VM itself, outside its containers; requires debug mode. The process is killed \
            when the caller disconnects",
        params: &[
            Param {
                name: "args",
                kind: "array",
                required: true,
                summary: "strings: the program, which is looked up in PATH unless it contains a slash, and its \
                    arguments",
            },
            Param {
                name: "env",
                kind: "array",
                required: false,
                summary: "strings NAME=VALUE; PATH, HOME and TERM have defaults",
            },
            Param { name: "cwd", kind: "string", required: false, summary: "the working directory; / by default" },
            Param {
                name: "terminal",
                kind: "boolean",
                required: false,
                summary: "allocate a terminal; all output is then sent as stdout",
            },
            Param { name: "rows", kind: "integer", required: false, summary: "the terminal's lines" },
            Param { name: "columns", kind: "integer", required: false, summary: "the terminal's columns" },
            Param {
                name: "stdin",
                kind: "boolean",
                required: false,
                summary: "without a terminal: connect stdin, which is /dev/null otherwise",
            },
        ],
        result: "{exit_code}: 0 to 255, or 128 plus the number of the signal that killed the process",
        kind: Kind::Streaming {
            notifications: "sends {stream: stdout or stderr, data: base64} and {taken: bytes of input that the guest \
                has taken}; receives `exec.input` {data: base64} or {end: true}, with at most 256 KiB not yet taken, \
                `exec.resize` {rows, columns} and `exec.signal` {signal: number, sent to the process group}",
            run: |sandbox, call| Box::pin(exec::run(sandbox, call)),
        },
    },
    Method {
        name: "compute.vm.create",
        summary: "Refused: containerd creates VMs",
        params: &[],
        result: "none",
        kind: Kind::Refused(
            "containerd creates a VM with the first container of a sandbox: ctr run --runtime io.containerd.husk.v1 \
                IMAGE ID, nerdctl run, or a pod",
        ),
    },
    Method {
        name: "compute.vm.start",
        summary: "Refused: containerd starts VMs",
        params: &[],
        result: "none",
        kind: Kind::Refused("containerd starts a VM with the first container of a sandbox: ctr task start ID"),
    },
    Method {
        name: "compute.vm.stop",
        summary: "Refused: containerd stops VMs",
        params: &[],
        result: "none",
        kind: Kind::Refused(
            "containerd stops a VM with the last container of a sandbox: ctr task kill --signal SIGTERM ID, then ctr \
                task rm ID",
        ),
    },
    Method {
        name: "compute.vm.remove",
        summary: "Refused: containerd removes VMs",
        params: &[],
        result: "none",
        kind: Kind::Refused(
            "containerd removes a VM with the last container of a sandbox: ctr task rm --force ID, then ctr container \
                rm ID",
        ),
    },
];
