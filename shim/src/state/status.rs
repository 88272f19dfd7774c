//! What is known of a sandbox, as JSON: the part that is on disk, which also stands when its shim is dead. What only the shim knows beside it
//! is added in `sandbox`.

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::facts::{Boot, MachineRecord};
use super::store::State;
use crate::state::life::Life;

/// A time as people read it (RFC 3339), always with three digits after the second; from a file, so it may be any number.
pub fn utc(ms: u64) -> String {
    let second = i64::try_from(ms / 1000).ok().and_then(|second| OffsetDateTime::from_unix_timestamp(second).ok());
    match second.and_then(|second| second.format(&Rfc3339).ok()) {
        Some(second) => format!("{}.{:03}Z", second.trim_end_matches('Z'), ms % 1000),
        None => format!("{ms} ms after 1970"),
    }
}

/// What is on disk, in full.
pub fn of(state: &State) -> Value {
    let mut status = summary(state);
    status["transitions"] = state.vm().map_or_else(|| json!([]), transitions);
    status["boot"] = state.boot().map_or(Value::Null, boot);
    status["dir"] = json!(state.dir());
    status
}

/// The same, without what is long: for a list.
pub fn summary(state: &State) -> Value {
    json!({
        "sandbox": state.sandbox(),
        "namespace": state.namespace(),
        "created": state.created_ms().map(utc),
        "created_ms": state.created_ms(),
        "shim": {
            "pid": state.shim().map(|shim| shim.pid),
            // What cannot be found out is told by whoever finds the shim silent.
            "alive": state.shim_lives().unwrap_or(false),
        },
        "state": state.vm().map(Life::state),
        "machine": state.machine().map(machine),
        "containers": state.containers().keys().map(|id| json!({"id": id})).collect::<Vec<_>>(),
    })
}

fn machine(machine: &MachineRecord) -> Value {
    json!({
        "pid": machine.process.pid,
        "alive": machine.process.runs().unwrap_or(false),
        "cid": machine.cid,
        "vcpus": machine.vcpus,
        "memory_mib": machine.memory_mib,
        "accel": machine.accel,
        "board": machine.board,
        "kernel": machine.kernel,
        "init": machine.init,
        "kernel_file": machine.kernel_file,
        "initrd_file": machine.initrd_file,
        "debug": machine.debug,
    })
}

fn transitions(vm: &Life) -> Value {
    let told = |made: &crate::state::life::Transition| json!({"from": made.from, "to": made.to, "cause": made.cause, "at": utc(made.at_ms), "at_ms": made.at_ms});
    vm.transitions().map(told).collect()
}

fn boot(boot: &Boot) -> Value {
    json!({"began": utc(boot.began_ms), "began_ms": boot.began_ms, "milestones": boot.milestones})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_one_width_unless_they_are_none() {
        let table = [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_795_256_789_010, "2026-11-21T10:26:29.010Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
            (u64::MAX, "18446744073709551615 ms after 1970"),
        ];
        for (ms, wanted) in table {
            assert_eq!(utc(ms), wanted);
        }
    }
}
