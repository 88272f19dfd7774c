//! `husk events`.

use std::io::{self, Write};

use anyhow::Result;
use husk_shim::state::State;
use husk_shim::state::status::utc;
use serde_json::{Value, json};

use crate::client::Problem;
use crate::find;
use crate::print::{field, shown};

pub fn run(id: &str, follow: bool, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let mut out = io::stdout().lock();
    let told = find::connect(&state).and_then(|mut client| {
        client.stream("compute.vm.events.tail", json!({"follow": follow}), |part| {
            let forgotten = part["forgotten"].as_u64().unwrap_or(0);
            if forgotten > 0 {
                writeln!(io::stderr(), "husk: {forgotten} events before these are not kept any more")?;
            }
            for event in part["events"].as_array().into_iter().flatten() {
                print(&mut out, event, as_json)?;
            }
            out.flush()
        })
    });
    match told {
        Ok(answer) if follow && answer["ended"] == true => {
            writeln!(io::stderr(), "husk: the sandbox has ended")?;
        }
        Ok(_) => {}
        Err(Problem::Closed) if follow => writeln!(io::stderr(), "husk: the sandbox's shim has ended")?,
        Err(problem) if problem.is_silence() => {
            let why = shown(&problem.to_string());
            writeln!(io::stderr(), "husk: {why}; of its events only the VM's states are on the disk:")?;
            for event in of_disk(&state) {
                print(&mut out, &event, as_json)?;
            }
        }
        Err(problem) => return Err(problem.into()),
    }
    Ok(())
}

/// What a dead shim has left.
fn of_disk(state: &State) -> Vec<Value> {
    let transitions = state.vm().into_iter().flat_map(|vm| vm.transitions());
    let event = |made: &husk_shim::state::life::Transition| {
        json!({
            "number": null,
            "at_ms": made.at_ms,
            "kind": "vm",
            "what": "the VM's state",
            "fields": {"from": made.from, "to": made.to, "cause": made.cause},
        })
    };
    transitions.map(event).collect()
}

fn print(out: &mut impl Write, event: &Value, as_json: bool) -> io::Result<()> {
    if as_json { writeln!(out, "{event}") } else { writeln!(out, "{}", line(event)) }
}

/// An event in a line: when, about what, what, and the particulars as the log has them.
fn line(event: &Value) -> String {
    let at = event["at_ms"].as_u64().map_or_else(|| "-".to_owned(), utc);
    let mut line = format!("{at:<24}  {:<10}  {}", field(&event["kind"]), field(&event["what"]));
    for (name, value) in event["fields"].as_object().into_iter().flatten() {
        let text = field(value);
        let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || matches!(c, '"' | '='));
        line.push_str(&if plain { format!(" {name}={text}") } else { format!(" {name}={text:?}") });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let event = json!({
            "number": 3,
            "at_ms": 1_795_256_789_012_u64,
            "kind": "vm",
            "what": "the VM's state",
            "fields": {"to": "Failed", "cause": "QEMU\nwas \x1b[31mkilled", "pid": 7, "none": ""},
        });
        let wanted = "2026-11-21T10:26:29.012Z  vm          the VM's state cause=\"QEMU^Jwas ^[[31mkilled\" none=\"\" pid=7 to=Failed";
        assert_eq!(line(&event), wanted);
    }
}
