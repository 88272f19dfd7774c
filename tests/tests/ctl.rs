//! A sandbox's sockets, as whoever speaks JSON-RPC on them finds them: private, exact, and held up by nobody.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, Version};
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator::{Rpc, folder, husk};
use serde_json::{Value, json};

fn is_husk(test: &str) -> bool {
    Runtime::under_test().is_husk_or_tell(test)
}

#[test]
fn the_sockets_are_private_and_answer_every_line_as_json_rpc_says() -> Result<()> {
    if !is_husk("the_sockets_are_private_and_answer_every_line_as_json_rpc_says") {
        return Ok(());
    }
    // So that the init has something to log.
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
    for (line, code, wanted) in table {
        rpc.send(line.as_bytes())?;
        let answer = rpc.receive()?.context("no answer")?;
        ensure!(answer["error"]["code"] == code && answer["id"] == wanted, "{line}: {answer}");
    }
    for (method, who) in [
        ("create", "containerd creates"),
        ("start", "containerd starts"),
        ("stop", "ctr task kill"),
        ("remove", "ctr task rm"),
    ] {
        for name in [method.to_owned(), format!("compute.vm.{method}")] {
            let answer = rpc.call(&name, json!({}))?;
            let told = answer["error"]["message"].as_str().unwrap_or_default();
            ensure!(told.contains("containerd") && told.contains(who), "{name}: {answer}");
        }
    }
    for method in ["compute.vm.status", "status"] {
        ensure!(rpc.call(method, json!({}))?["result"]["sandbox"] == id);
    }
    ensure!(rpc.call("list", json!({}))?["result"]["sandboxes"][0]["sandbox"] == id);
    let last = rpc.call("events.tail", json!({"after": 2}))?["result"]["last"].clone();
    ensure!(rpc.call("events.tail", json!({"after": last}))?["result"] == json!({"last": last, "ended": false}));

    // What is listed is there, and takes what it says that it takes.
    let listed = rpc.call("rpc.discover", json!({}))?["result"]["methods"].clone();
    let names: Vec<&str> = listed.as_array().context("methods")?.iter().filter_map(|m| m["name"].as_str()).collect();
    for method in ["status", "list", "events.tail", "console.endpoint", "logs", "create", "start", "stop", "remove"] {
        ensure!(names.contains(&format!("compute.vm.{method}").as_str()), "no {method} in {names:?}");
    }
    for name in names {
        let answer = Rpc::connect(containerd, id)?.call(name, json!({"no such parameter": 1}))?;
        ensure!(answer["error"]["code"] != -32601, "{name}: {answer}");
    }

    // A line without end is cut off; others have not noticed.
    let mut hostile = Rpc::connect(containerd, id)?;
    let sent = hostile.send(&vec![b'x'; 3 << 20]);
    let answer = hostile.receive()?;
    let told = answer.as_ref().map(|answer| answer["error"]["message"].clone());
    ensure!(told == Some(json!("a line is longer than 1048576 bytes")), "{answer:?}, {sent:?}");
    ensure!(hostile.receive()?.is_none());
    ensure!(rpc.call("status", json!({}))?["result"]["state"] == "Running");
    Ok(())
}

#[test]
fn clients_that_stay_connected_hold_up_no_end_and_leave_nothing() -> Result<()> {
    if !is_husk("clients_that_stay_connected_hold_up_no_end_and_leave_nothing") {
        return Ok(());
    }
    let containerd = Containerd::start(Version::default_for_tests())?;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(&containerd);
    let container = containerd.detached(&[], "held", &["sleep", "1000"])?;
    let id = container.id();
    let mut clients = Vec::new();
    for _ in 0..80 {
        // Some say nothing, some ask for without end and read nothing; the last are turned away.
        let mut client = Rpc::connect(&containerd, id)?;
        if clients.len() % 2 == 0 {
            let follow = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"events.tail\",\"params\":{\"follow\":true}}\n";
            // One that was turned away may not take it any more.
            let _ = client.send(follow.as_bytes());
        }
        clients.push(client);
    }
    let busy = clients.last_mut().context("a client")?.receive()?.context("no answer")?;
    ensure!(busy["error"]["code"] == -32000, "{busy}");
    // husk goes without the shim then.
    let page = husk(&containerd, &["status", id])?.ok()?.text();
    ensure!(page.contains("NOTE") && page.contains("state       Running"), "{page}");
    let consoles: Vec<_> = (0..10)
        .map(|_| husk_shim::host::socket::connect(&folder(&containerd, id), "console.sock"))
        .collect::<std::io::Result<_>>()?;
    container.kill("SIGKILL")?;
    container.await_status("STOPPED")?;
    let started = std::time::Instant::now();
    ensure!(container.delete_task()? == 137);
    ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    containerd.ctr(["container", "rm", id]).ok()?;
    before.expect_none_since(&containerd)?;
    drop((clients, consoles));
    Ok(())
}
