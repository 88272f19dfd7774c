//! `husk list`.

use std::io::{self, Write};
use std::sync::Mutex;
use std::thread;

use anyhow::Result;
use husk_protos::lock::lock;
use husk_shim::state::State;
use husk_shim::state::life::now_ms;
use husk_shim::state::status;
use husk_shim::state::status::{List, Summary};

use crate::find::{self, Known};
use crate::print::{self, duration, or_dash, shown};

/// Shims that are queried at once, so that a shim that does not answer delays no others.
const AT_ONCE: usize = 16;

const TITLES: [&str; 9] = ["SANDBOX", "NAMESPACE", "STATE", "PID", "CID", "VCPU", "MEMORY", "AGE", "CONTAINERS"];

pub(crate) fn run(as_json: bool) -> Result<()> {
    let all = query(&find::sandboxes()?);
    let mut out = io::stdout().lock();
    if as_json {
        print::json(&mut out, &all)?;
        return Ok(());
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    rows.extend(all.iter().map(|known| row(known, now_ms())));
    out.write_all(print::table(&rows).as_bytes())?;
    for known in &all {
        if let Some(why) = &known.silence {
            let name = shown(&known.status.sandbox);
            writeln!(io::stderr(), "husk: * {name}: {}; showing its last state on disk", shown(why))?;
        }
    }
    Ok(())
}

/// The summaries of these sandboxes, in the same order.
fn query(states: &[State]) -> Vec<Known<Summary>> {
    let queue = Mutex::new(states.iter().enumerate());
    let summaries = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(states.len()) {
            scope.spawn(|| {
                loop {
                    let next = lock(&queue).next();
                    let Some((index, state)) = next else { break };
                    let summary = summary(state);
                    lock(&summaries).push((index, summary));
                }
            });
        }
    });
    let mut summaries = std::mem::take(&mut *lock(&summaries));
    summaries.sort_by_key(|(index, _)| *index);
    summaries.into_iter().map(|(_, summary)| summary).collect()
}

fn summary(state: &State) -> Known<Summary> {
    let read = |state: &State| List { sandboxes: vec![status::summary(state)] };
    let Known { status, silence } = find::known(state, "compute.vm.list", read);
    Known { status: status.sandboxes.into_iter().next().unwrap_or_default(), silence }
}

fn row(known: &Known<Summary>, now_ms: u64) -> Vec<String> {
    let status = &known.status;
    let machine = status.machine.as_ref();
    let mark = if known.silence.is_some() { "*" } else { "" };
    let age = status.created_ms.map(|created| duration(now_ms.saturating_sub(created)));
    let containers: Vec<String> = status.containers.iter().map(|container| shown(&container.id)).collect();
    vec![
        shown(&status.sandbox),
        shown(&status.namespace),
        format!("{}{mark}", or_dash(status.state.as_ref())),
        or_dash(machine.map(|machine| machine.pid)),
        or_dash(machine.map(|machine| machine.cid)),
        or_dash(machine.map(|machine| machine.vcpus)),
        or_dash(machine.map(|machine| format!("{} MiB", machine.memory_mib))),
        or_dash(age),
        or_dash(Some(containers.join(",")).filter(|ids| !ids.is_empty())),
    ]
}

#[cfg(test)]
mod tests {
    use husk_shim::state::life::VmState;
    use husk_shim::state::status::{ContainerStatus, MachineStatus, Name};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_marks_a_sandbox_whose_shim_is_silent_and_unknown_values() {
        let id = |id: &str| ContainerStatus { id: id.to_owned(), ..Default::default() };
        let full = Summary {
            sandbox: "web\x1b".into(),
            namespace: "default".into(),
            created_ms: Some(1000),
            state: Some(Name::Known(VmState::Running)),
            machine: Some(MachineStatus { pid: 7, cid: 3, vcpus: 2, memory_mib: 256, ..Default::default() }),
            containers: vec![id("a"), id("b")],
            ..Default::default()
        };
        let expected = ["web^[", "default", "Running*", "7", "3", "2", "256 MiB", "59.0 s", "a,b"];
        let silent = Known { status: full, silence: Some("its shim is dead".into()) };
        assert_eq!(row(&silent, 60_000), expected);
        let bare = Summary { sandbox: "web".into(), namespace: "default".into(), ..Default::default() };
        let known = Known { status: bare, silence: None };
        assert_eq!(row(&known, 0), ["web", "default", "-", "-", "-", "-", "-", "-", "-"]);
        let sources = [&known, &silent].map(|known| serde_json::to_value(known).unwrap()["source"].clone());
        assert_eq!(sources, [json!({"from": "shim"}), json!({"from": "disk", "because": "its shim is dead"})]);
    }
}
