//! A sandbox's sockets from the view of a JSON-RPC client: private, exact, and never blocked by other clients.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Version;
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator::{Rpc, folder, husk};
use serde_json::{Value, json};

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_sockets_are_private_and_speak_json_rpc() -> Result<()> {
    // Makes the init write log lines.
    let configured = Configured::start("log_level = \"debug\"\n")?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "rpc", &["sleep", "1000"])?;
    let id = container.id();
    let folder = folder(containerd, id);
    let mode = |path: &std::path::Path| -> Result<u32> { Ok(path.metadata()?.permissions().mode() & 0o7777) };
    ensure!(mode(&folder)? == 0o700);
    for file in ["ctl.sock", "console.sock", "console.log", "guest.log", "state.json"] {
        ensure!(mode(&folder.join(file))? == 0o600, "{file}");
    }

    let mut rpc = Rpc::connect(containerd, id)?;
    let table = [
        ("no json\n", -32700, Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":7}\n", -32600, json!(7)),
        ("[]\n", -32600, Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":\"x\",\"method\":\"compute.vm.fly\"}\n", -32601, json!("x")),
        ("{\"jsonrpc\":\"2.0\",\"id\":8,\"method\":\"status\",\"params\":[1]}\n", -32602, json!(8)),
        ("{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"logs\",\"params\":{\"lines\":-1}}\n", -32602, json!(9)),
        ("{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"logs\",\"params\":{\"source\":\"x\"}}\n", -32602, json!(9)),
        ("{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"events.tail\",\"params\":{\"x\":1}}\n", -32602, json!(9)),
    ];
    for (line, code, expected) in table {
        rpc.send(line.as_bytes())?;
        let response = rpc.receive()?.context("no response")?;
        ensure!(response["error"]["code"] == code && response["id"] == expected, "{line}: {response}");
    }
    for (method, hint) in [
        ("create", "containerd creates"),
        ("start", "containerd starts"),
        ("stop", "ctr task kill"),
        ("remove", "ctr task rm"),
    ] {
        for name in [method.to_owned(), format!("compute.vm.{method}")] {
            let response = rpc.call(&name, json!({}))?;
            let message = response["error"]["message"].as_str().unwrap_or_default();
            ensure!(message.contains("containerd") && message.contains(hint), "{name}: {response}");
        }
    }
    for method in ["compute.vm.status", "status"] {
        ensure!(rpc.call(method, json!({}))?["result"]["sandbox"] == id);
    }
    ensure!(rpc.call("list", json!({}))?["result"]["sandboxes"][0]["sandbox"] == id);
    let last = rpc.call("events.tail", json!({"after": 2}))?["result"]["last"].clone();
    ensure!(rpc.call("events.tail", json!({"after": last}))?["result"] == json!({"last": last, "ended": false}));

    // Every listed method exists and checks its parameters.
    let listed = rpc.call("rpc.discover", json!({}))?["result"]["methods"].clone();
    let names: Vec<&str> = listed.as_array().context("methods")?.iter().filter_map(|m| m["name"].as_str()).collect();
    for method in ["status", "list", "events.tail", "console.endpoint", "logs", "create", "start", "stop", "remove"] {
        ensure!(names.contains(&format!("compute.vm.{method}").as_str()), "no {method} in {names:?}");
    }
    for name in names {
        let response = Rpc::connect(containerd, id)?.call(name, json!({"no such parameter": 1}))?;
        ensure!(response["error"]["code"] != -32601, "{name}: {response}");
    }

    // An endless line is rejected, without effect on other clients.
    let mut hostile = Rpc::connect(containerd, id)?;
    let sent = hostile.send(&vec![b'x'; 3 << 20]);
    let response = hostile.receive()?;
    let message = response.as_ref().map(|response| response["error"]["message"].clone());
    ensure!(message == Some(json!("a line is longer than 1048576 bytes")), "{response:?}, {sent:?}");
    ensure!(hostile.receive()?.is_none());
    ensure!(rpc.call("status", json!({}))?["result"]["state"] == "Running");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn clients_that_stay_connected_do_not_delay_deletion_and_leave_nothing_behind() -> Result<()> {
    let containerd = Containerd::start(Version::default_for_tests())?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    let container = containerd.detached(&[], "held", &["sleep", "1000"])?;
    let id = container.id();
    let mut clients = Vec::new();
    for _ in 0..80 {
        // Some clients send nothing, others follow events and read nothing. The last ones are over the limit.
        let mut client = Rpc::connect(&containerd, id)?;
        if clients.len() % 2 == 0 {
            let follow = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"events.tail\",\"params\":{\"follow\":true}}\n";
            // A rejected client may already be closed.
            let _ = client.send(follow.as_bytes());
        }
        clients.push(client);
    }
    let busy = clients.last_mut().context("a client")?.receive()?.context("no response")?;
    ensure!(busy["error"]["code"] == -32000, "{busy}");
    // husk then works without the shim.
    let page = husk(&containerd, &["status", id])?.ok()?.text();
    ensure!(page.contains("NOTE") && page.contains("state       Running"), "{page}");
    let consoles: Vec<_> = (0..10)
        .map(|_| husk_shim::host::socket::connect(&folder(&containerd, id), "console.sock"))
        .collect::<std::io::Result<_>>()?;
    container.kill_and_wait()?;
    // If the shim waited for its clients, it would not end.
    ensure!(container.delete_task()? == 137);
    containerd.ctr(["container", "rm", id]).ok()?;
    before.expect_none_since(&containerd)?;
    drop((clients, consoles));
    Ok(())
}
