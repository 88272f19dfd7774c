//! All that can be asked of a sandbox. How a method is added is told in [`super`].

use std::sync::Arc;

use serde_json::json;

use crate::ctl::{Kind, Method, Param, events, exec, logs};
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
        name: "compute.vm.events.tail",
        summary: "What has happened to this sandbox lately: its VM's states, what containerd is told of its tasks, health, supervisor",
        params: &[
            Param {
                name: "after",
                kind: "integer",
                required: false,
                summary: "the number of the last event that the caller has; 0 for none",
            },
            Param {
                name: "follow",
                kind: "boolean",
                required: false,
                summary: "send what happens from now on too, until the caller ends its side of the connection",
            },
        ],
        result: "{last: number of the last event, ended: whether the sandbox has ended}",
        kind: Kind::Streaming {
            notifications: "{events: [{number, at_ms, kind, what, fields}], forgotten: how many before the first are not kept any more}",
            run: |sandbox, call| Box::pin(events::tail(sandbox, call)),
        },
    },
    Method {
        name: "compute.vm.logs",
        summary: "What the guest has written to its console, and its init to its log",
        params: &[
            Param {
                name: "source",
                kind: "string",
                required: false,
                summary: "console or init; both if it is not given",
            },
            Param { name: "lines", kind: "integer", required: false, summary: "only so many last lines of each" },
            Param {
                name: "follow",
                kind: "boolean",
                required: false,
                summary: "send what comes from now on too, until the caller ends its side of the connection",
            },
        ],
        result: "{ended: whether the sandbox has ended}",
        kind: Kind::Streaming {
            notifications: "{source, lines: [string]}, in which control characters are as the guest wrote them; or {source, missed: bytes that came faster than they were taken}",
            run: |sandbox, call| Box::pin(logs::run(sandbox, call)),
        },
    },
    Method {
        name: "compute.vm.console.endpoint",
        summary: "Where the guest's console is served: a unix socket, on which what comes from the guest is preceded by its last 64 KiB, and what is sent is typed",
        params: &[],
        result: "{path, log, machine: unused, up or ended, replay_bytes}",
        kind: Kind::Unary(|sandbox, _| Box::pin(async move { Ok(json!(sandbox.guest_logs().console.endpoint())) })),
    },
    Method {
        name: "compute.vm.exec",
        summary: "Runs a process in the VM itself, beside its containers; only in debug mode. It is ended when the caller goes",
        params: &[
            Param {
                name: "args",
                kind: "array",
                required: true,
                summary: "strings: the program, searched in PATH if it has no slash, and its arguments",
            },
            Param {
                name: "env",
                kind: "array",
                required: false,
                summary: "strings NAME=VALUE; of PATH, HOME and TERM those that are missing are set",
            },
            Param { name: "cwd", kind: "string", required: false, summary: "where it begins; else /" },
            Param {
                name: "terminal",
                kind: "boolean",
                required: false,
                summary: "give it a terminal: its output is then one stream, stdout",
            },
            Param { name: "rows", kind: "integer", required: false, summary: "the terminal's lines" },
            Param { name: "columns", kind: "integer", required: false, summary: "the terminal's characters in a line" },
            Param {
                name: "stdin",
                kind: "boolean",
                required: false,
                summary: "without a terminal: let it have a stdin, which is else /dev/null",
            },
        ],
        result: "{exit_code}: 0 to 255, or 128 plus the signal that killed it",
        kind: Kind::Streaming {
            notifications: "{stream: stdout or stderr, data: base64}, {taken: bytes of the input that are on their way}; takes `exec.input` {data: base64} or {end: true}, of which no more than 256 KiB may not be taken yet, `exec.resize` {rows, columns} and `exec.signal` {signal: number, for its process group}",
            run: |sandbox, call| Box::pin(exec::run(sandbox, call)),
        },
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
