//! `husk events`.

use std::io::{self, Write};

use anyhow::Result;
use husk_protos::chain::Chain;
use husk_shim::ctl::messages::{Event, EventsEnd, EventsParams, EventsPart};
use husk_shim::state::State;
use husk_shim::state::life::Transition;
use husk_shim::state::recent::EventKind;
use husk_shim::state::status::{Name, utc};
use serde_json::{Map, json};

use crate::client::CallError;
use crate::find;
use crate::print::{field, or_dash, shown};

pub(crate) fn run(id: &str, follow: bool, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let mut out = io::stdout().lock();
    let ended: Result<EventsEnd, CallError> = find::connect(&state).and_then(|mut client| {
        let params = EventsParams { after: 0, follow };
        client.stream("compute.vm.events.tail", &params, |EventsPart { events, forgotten }| {
            if forgotten > 0 {
                writeln!(io::stderr(), "husk: {forgotten} earlier events have been discarded")?;
            }
            for event in &events {
                print(&mut out, event, as_json)?;
            }
            out.flush()
        })
    });
    match ended {
        Ok(EventsEnd { ended: true, .. }) if follow => writeln!(io::stderr(), "husk: the sandbox has ended")?,
        Ok(_) => {}
        Err(CallError::Closed) if follow => writeln!(io::stderr(), "husk: the sandbox's shim has ended")?,
        Err(error) if error.is_silence() => {
            let why = shown(&Chain(&error).to_string());
            writeln!(io::stderr(), "husk: {why}; showing the VM's state changes, the only events on disk")?;
            for event in on_disk(&state) {
                print(&mut out, &event, as_json)?;
            }
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The VM's state changes, which outlive the shim.
fn on_disk(state: &State) -> Vec<Event> {
    let event = |Transition { from, to, cause, at_ms }: &Transition| Event {
        number: None,
        at_ms: Some(*at_ms),
        kind: Name::Known(EventKind::Vm),
        what: "the VM's state".to_owned(),
        fields: Map::from_iter([
            ("from".to_owned(), json!(from)),
            ("to".to_owned(), json!(to)),
            ("cause".to_owned(), json!(cause)),
        ]),
    };
    state.vm().into_iter().flat_map(|vm| vm.transitions()).map(event).collect()
}

fn print(out: &mut impl Write, event: &Event, as_json: bool) -> io::Result<()> {
    if as_json { writeln!(out, "{}", serde_json::to_value(event)?) } else { writeln!(out, "{}", line(event)) }
}

/// An event in one line: time, subject, description, and the particulars in the syntax of the log.
fn line(event: &Event) -> String {
    let at = or_dash(event.at_ms.map(utc));
    let mut line = format!("{at:<24}  {:<10}  {}", shown(&event.kind.to_string()), shown(&event.what));
    for (name, value) in &event.fields {
        let (name, text) = (shown(name), field(value));
        let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || matches!(c, '"' | '='));
        line.push_str(&if plain { format!(" {name}={text}") } else { format!(" {name}={text:?}") });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_contains() {
        let event = json!({
            "number": 3,
            "at_ms": 1_795_256_789_012_u64,
            "kind": "vm",
            "what": "the VM's state",
            "fields": {"to": "Failed", "cause": "QEMU\nwas \x1b[31mkilled", "pid": 7, "none": ""},
        });
        let expected = "2026-11-21T10:26:29.012Z  vm          the VM's state cause=\"QEMU^Jwas ^[[31mkilled\" none=\"\" pid=7 to=Failed";
        assert_eq!(line(&serde_json::from_value(event).unwrap()), expected);
        let odd = json!({"kind": "wea\x1bther", "fields": {"\x1b": null}});
        assert_eq!(line(&serde_json::from_value(odd).unwrap()), format!("{:<24}  wea^[ther    ^[=-", "-"));
    }
}
