//! `husk list`.

use std::io::{self, Write};
use std::sync::Mutex;
use std::thread;

use anyhow::Result;
use husk_shim::state::State;
use husk_shim::state::life::now_ms;
use husk_shim::state::status;
use serde_json::{Value, json};

use crate::find::{self, Known};
use crate::print::{self, duration, field, shown};

/// Shims that are asked at once: one that does not answer holds up no others.
const AT_ONCE: usize = 16;

const TITLES: [&str; 9] = ["SANDBOX", "NAMESPACE", "STATE", "PID", "CID", "VCPU", "MEMORY", "AGE", "CONTAINERS"];

pub fn run(as_json: bool) -> Result<()> {
    let listed = ask(&find::sandboxes()?);
    let mut out = io::stdout().lock();
    if as_json {
        let all: Vec<Value> = listed.iter().map(as_told).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&json!(all))?)?;
        return Ok(());
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    rows.extend(listed.iter().map(|known| row(known, now_ms())));
    out.write_all(print::table(&rows).as_bytes())?;
    for known in &listed {
        if let Some(why) = &known.silent {
            let name = field(&known.status["sandbox"]);
            writeln!(io::stderr(), "husk: * {name}: {}; this is from the disk, the last that it wrote", shown(why))?;
        }
    }
    Ok(())
}

/// What is known of each, in the same order.
fn ask(states: &[State]) -> Vec<Known> {
    let queue = Mutex::new(states.iter().enumerate());
    let told = Mutex::new(Vec::new());
    let lock_next = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(states.len()) {
            scope.spawn(|| {
                while let Some((index, state)) = lock_next() {
                    let known = listed(state);
                    told.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((index, known));
                }
            });
        }
    });
    let mut told = told.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    told.sort_by_key(|(index, _)| *index);
    told.into_iter().map(|(_, known)| known).collect()
}

fn listed(state: &State) -> Known {
    let read = |state: &State| json!({"sandboxes": [status::summary(state)]});
    let mut known = find::known(state, "compute.vm.list", read);
    known.status = known.status["sandboxes"][0].take();
    known
}

fn as_told(known: &Known) -> Value {
    let mut status = known.status.clone();
    status["source"] = source(known);
    status
}

/// Where it is from, for readers of JSON.
pub fn source(known: &Known) -> Value {
    match &known.silent {
        None => json!({"from": "shim"}),
        Some(why) => json!({"from": "disk", "because": why}),
    }
}

fn row(known: &Known, now_ms: u64) -> Vec<String> {
    let status = &known.status;
    let machine = &status["machine"];
    let mark = if known.silent.is_some() { "*" } else { "" };
    let memory = machine["memory_mib"].as_u64().map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB"));
    let age = status["created_ms"].as_u64().map(|created| duration(now_ms.saturating_sub(created)));
    let containers: Vec<String> =
        status["containers"].as_array().into_iter().flatten().map(|container| field(&container["id"])).collect();
    vec![
        field(&status["sandbox"]),
        field(&status["namespace"]),
        format!("{}{mark}", field(&status["state"])),
        field(&machine["pid"]),
        field(&machine["cid"]),
        field(&machine["vcpus"]),
        memory,
        age.unwrap_or_else(|| "-".to_owned()),
        if containers.is_empty() { "-".to_owned() } else { containers.join(",") },
    ]
}
