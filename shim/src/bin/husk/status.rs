//! `husk status`: all that is known of one sandbox.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Result;
use husk_shim::state::life::now_ms;
use husk_shim::state::status;
use serde_json::Value;

use crate::boot_profile::{bars, steps};
use crate::find::{self, Known};
use crate::list::source;
use crate::print::{self, duration, field, shown};

pub fn run(id: &str, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let known = find::known(&state, "compute.vm.status", status::of);
    let mut out = io::stdout().lock();
    if as_json {
        let mut told = known.status.clone();
        told["source"] = source(&known);
        writeln!(out, "{}", serde_json::to_string_pretty(&told)?)?;
    } else {
        out.write_all(page(&known, now_ms()).as_bytes())?;
    }
    Ok(())
}

/// The status for people. Nothing in it is a command to the terminal.
fn page(known: &Known, now_ms: u64) -> String {
    let status = &known.status;
    let mut page = String::new();
    let mut line = |title: &str, text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "{title:<12}{text}");
    };
    line("sandbox", format!("{} in namespace {}", field(&status["sandbox"]), field(&status["namespace"])));
    if let Some(why) = &known.silent {
        line("NOTE", format!("{}: this is what it wrote last, and may be out of date", shown(why)));
    }
    let last = status["transitions"].as_array().and_then(|all| all.last());
    let since = last.and_then(|last| last["at_ms"].as_u64()).or(status["created_ms"].as_u64());
    let since = since.map_or_else(String::new, |at| format!(", for {}", duration(now_ms.saturating_sub(at))));
    let cause = last.map_or_else(String::new, |last| format!(": {}", field(&last["cause"])));
    line("state", format!("{}{since}{cause}", field(&status["state"])));
    line("shim", process(&status["shim"]));
    let machine = &status["machine"];
    if machine.is_null() {
        line("machine", "none has been started".to_owned());
    } else {
        let size = format!(
            "{} vCPU, {} MiB, CID {}, {} on {}",
            field(&machine["vcpus"]),
            field(&machine["memory_mib"]),
            field(&machine["cid"]),
            field(&machine["accel"]),
            field(&machine["board"])
        );
        line("machine", format!("QEMU, {}; {size}", process(machine)));
        line("kernel", format!("{} from {}", field(&machine["kernel"]), field(&machine["kernel_file"])));
        line("init", format!("{} from {}", field(&machine["init"]), field(&machine["initrd_file"])));
        if machine["debug"] == true {
            line("debug", "on: a shell on the console, and husk exec".to_owned());
        }
    }
    line("health", health(&status["health"]));
    line("supervisor", supervisor(&status["supervisor"]));
    line("folder", field(&status["dir"]));
    page.push_str("\ncontainers\n");
    page.push_str(&indented(&containers(&status["containers"])));
    page.push_str("\ntransitions\n");
    page.push_str(&indented(&transitions(&status["transitions"])));
    let steps = steps(&status["boot"]);
    if !steps.is_empty() {
        let total = status["boot"]["milestones"].as_array().into_iter().flatten();
        let total = total.filter_map(|milestone| milestone["at_us"].as_u64()).max().unwrap_or(0);
        page.push_str("\nboot\n");
        page.push_str(&indented(&bars(&steps, total)));
    }
    page
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn process(process: &Value) -> String {
    let alive = if process["alive"] == true { "alive" } else { "dead" };
    format!("pid {}, {alive}", field(&process["pid"]))
}

fn health(health: &Value) -> String {
    if health.is_null() {
        return "not known".to_owned();
    }
    if let Some(cause) = health["cause_of_death"].as_str() {
        return format!("dead: {}", shown(cause));
    }
    let number = |name: &str| health[name].as_u64().unwrap_or(0);
    let verdict = if number("missed") > 0 { "heartbeats are missing" } else { "good" };
    format!(
        "{verdict}: last heartbeat {} ago, one is due every {}, {} missed",
        duration(number("since_heartbeat_ms")),
        duration(number("heartbeat_interval_ms")),
        number("missed")
    )
}

fn supervisor(supervisor: &Value) -> String {
    if supervisor.is_null() {
        return "none".to_owned();
    }
    let mut text = field(&supervisor["state"]);
    let mut add = |name: &str, value: &Value| {
        if !value.is_null() {
            let _ = write!(text, ", {name} {}", field(value));
        }
    };
    add("pid", &supervisor["pid"]);
    add("restarts", &supervisor["restarts"]);
    add("ms until it is started again:", &supervisor["wait_ms"]);
    add("last end:", &supervisor["last_end"]);
    text
}

fn containers(containers: &Value) -> String {
    let mut rows = vec![["CONTAINER", "PROCESS", "PID IN GUEST", "STATE"].map(str::to_owned).to_vec()];
    for container in containers.as_array().into_iter().flatten() {
        let id = field(&container["id"]);
        let processes: Vec<&Value> = container["processes"].as_array().into_iter().flatten().collect();
        if processes.is_empty() {
            let what = if container["creating"] == true { "being created" } else { "not known" };
            rows.push(vec![id.clone(), "-".to_owned(), "-".to_owned(), what.to_owned()]);
        }
        for process in processes {
            let exec = process["exec"].as_str().filter(|exec| !exec.is_empty());
            let pid = process["pid"].as_u64().filter(|pid| *pid != 0);
            let state = match (process["exit_status"].as_u64(), pid) {
                (Some(status), _) => format!("exited with {status}"),
                (None, Some(_)) => "alive".to_owned(),
                (None, None) => "not started".to_owned(),
            };
            let pid = pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            rows.push(vec![id.clone(), exec.map_or_else(|| "init".to_owned(), shown), pid, state]);
        }
    }
    if rows.len() == 1 { "none\n".to_owned() } else { print::table(&rows) }
}

fn transitions(transitions: &Value) -> String {
    let rows: Vec<Vec<String>> = transitions
        .as_array()
        .into_iter()
        .flatten()
        .map(|made| {
            let states = format!("{} -> {}", field(&made["from"]), field(&made["to"]));
            vec![field(&made["at"]), states, field(&made["cause"])]
        })
        .collect();
    if rows.is_empty() { "none\n".to_owned() } else { print::table(&rows) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Value {
        json!({
            "sandbox": "web", "namespace": "default", "created_ms": 1000, "state": "Failed",
            "shim": {"pid": 10, "alive": true},
            "machine": {"pid": 11, "alive": false, "cid": 3, "vcpus": 2, "memory_mib": 256, "accel": "Tcg",
                "board": "Microvm", "kernel": "6.12\u{1b}[2J", "init": "0.1.0", "kernel_file": "/k", "initrd_file": "/i"},
            "health": {"heartbeat_interval_ms": 10000, "since_heartbeat_ms": 12000, "missed": 1, "alive": true, "cause_of_death": null},
            "supervisor": {"state": "waiting", "pid": null, "restarts": 3, "last_end": "exited with status 1", "wait_ms": 4000},
            "containers": [{"id": "web", "processes": [
                {"exec": "", "pid": 20, "exit_status": null},
                {"exec": "sh", "pid": 21, "exit_status": 137},
                {"exec": "later", "pid": 0, "exit_status": null}]},
                {"id": "new", "creating": true}],
            "transitions": [{"from": "Running", "to": "Failed", "cause": "QEMU was killed\nby signal 9", "at": "2026-01-01T00:00:00Z", "at_ms": 2000}],
            "boot": {"milestones": [{"side": "host", "name": "QEMU started", "at_us": 5000}]},
            "dir": "/run/husk/default/web",
        })
    }

    #[test]
    fn all_of_it_is_told_and_nothing_of_it_is_a_command() {
        let page = page(&Known { status: status(), silent: None }, 62_000);
        assert!(!page.contains('\u{1b}'), "{page}");
        let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
        for wanted in [
            "sandbox     web in namespace default",
            "state       Failed, for 1m00s: QEMU was killed^Jby signal 9",
            "shim        pid 10, alive",
            "machine     QEMU, pid 11, dead; 2 vCPU, 256 MiB, CID 3, Tcg on Microvm",
            "kernel      6.12^[[2J from /k",
            "init        0.1.0 from /i",
            "health      heartbeats are missing: last heartbeat 12.0 s ago, one is due every 10.0 s, 1 missed",
            "supervisor  waiting, restarts 3, ms until it is started again: 4000, last end: exited with status 1",
            "folder      /run/husk/default/web",
            "  web        init     20            alive",
            "  web        sh       21            exited with 137",
            "  web        later    -             not started",
            "  new        -        -             being created",
            "  2026-01-01T00:00:00Z  Running -> Failed  QEMU was killed^Jby signal 9",
        ] {
            assert!(lines.contains(&wanted), "no {wanted:?} in\n{page}");
        }
        assert!(page.contains("start QEMU's process"), "{page}");
    }

    #[test]
    fn what_is_not_known_is_told_as_such() {
        let bare = json!({"sandbox": "web", "namespace": "default", "state": "Pending", "shim": {"pid": null, "alive": false}});
        let page = page(&Known { status: bare, silent: Some("its shim is dead".into()) }, 0);
        for wanted in [
            "NOTE        its shim is dead: this is what it wrote last, and may be out of date",
            "state       Pending",
            "machine     none has been started",
            "health      not known",
            "supervisor  none",
        ] {
            assert!(page.lines().any(|line| line == wanted), "no {wanted:?} in\n{page}");
        }
    }
}
