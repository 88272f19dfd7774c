//! `husk boot-profile`: where a boot's time went, as bars.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::{Result, bail};
use husk_shim::state::status;
use serde_json::{Value, json};

use crate::find;
use crate::print::{self, field, shown};

/// Cells of the bars.
const WIDTH: u64 = 48;

/// What leads to each milestone, where its name alone does not tell.
const PHASES: [(&str, &str, &str); 15] = [
    ("host", "configured", "make the vsock device and the cgroup"),
    ("host", "QEMU started", "start QEMU's process"),
    ("host", "virtiofsd started", "start virtiofsd"),
    ("host", "hello received", "wait for the guest's hello"),
    ("host", "guest connected", "connect to the guest's services"),
    ("host", "events subscribed", "subscribe to the guest's events"),
    ("guest", "kernel entered", "QEMU and its firmware"),
    ("guest", "init", "kernel, up to PID 1"),
    ("guest", "mounts", "init: mounts"),
    ("guest", "clock", "init: command line, log, clock"),
    ("guest", "cgroups", "init: cgroups"),
    ("guest", "system", "init: loopback, host name, limits, entropy"),
    ("guest", "extras", "init: write the extras"),
    ("guest", "listening", "init: services listen"),
    ("guest", "ready", "init: dial the host"),
];

pub fn run(id: &str, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let known = find::known(&state, "compute.vm.status", status::of);
    let steps = steps(&known.status["boot"]);
    if steps.is_empty() {
        bail!(
            "nothing is noted of a boot of {:?}, whose VM is {}; `husk status {}` tells how it came to that",
            state.sandbox(),
            field(&known.status["state"]),
            state.sandbox()
        );
    }
    let total = steps.iter().map(|step| step.end_us).max().unwrap_or(0);
    let mut out = io::stdout().lock();
    if as_json {
        let told: Vec<Value> = steps
            .iter()
            .map(|step| json!({"side": step.side, "milestone": step.name, "what": step.what, "start_us": step.start_us, "end_us": step.end_us}))
            .collect();
        let told = json!({"sandbox": state.sandbox(), "began": known.status["boot"]["began"], "total_us": total, "steps": told});
        writeln!(out, "{}", serde_json::to_string_pretty(&told)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "boot of {}, begun {}: {} ms up to `{}`",
        shown(state.sandbox()),
        field(&known.status["boot"]["began"]),
        ms(total),
        steps.iter().max_by_key(|step| step.end_us).map_or("-", |last| &last.name)
    )?;
    out.write_all(bars(&steps, total).as_bytes())?;
    Ok(())
}

/// What led from one milestone to the next of the same side.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    side: String,
    name: String,
    what: String,
    start_us: u64,
    end_us: u64,
}

/// The steps of a boot as `compute.vm.status` tells it, in the order in which they ended.
pub fn steps(boot: &Value) -> Vec<Step> {
    let (mut host, mut guest) = (0, None);
    let mut steps = Vec::new();
    for milestone in boot["milestones"].as_array().into_iter().flatten() {
        let (side, name) = (field(&milestone["side"]), field(&milestone["name"]));
        let end_us = milestone["at_us"].as_u64().unwrap_or(0);
        // The guest's first step begins where the machine was started; its clock begins with the second.
        let started = steps.iter().find(|step: &&Step| step.name == "QEMU started").map_or(0, |step| step.end_us);
        let start_us = if side == "guest" { guest.unwrap_or(started) } else { host };
        let known = PHASES.iter().find(|(of, milestone, _)| *of == side && *milestone == name);
        let what = known.map_or_else(|| format!("up to {name:?}"), |(_, _, what)| (*what).to_owned());
        if side == "guest" {
            guest = Some(end_us);
        } else {
            host = end_us;
        }
        steps.push(Step { side, name, what, start_us: start_us.min(end_us), end_us });
    }
    steps
}

/// A line for each step: who, when it began, how long it took, and both as a bar.
pub fn bars(steps: &[Step], total_us: u64) -> String {
    let cell = |us: u64| (us.saturating_mul(WIDTH).checked_div(total_us).unwrap_or(0)).min(WIDTH - 1) as usize;
    let mut rows = vec![["SIDE", "FROM MS", "TOOK MS", "WHAT", "|"].map(str::to_owned).to_vec()];
    for step in steps {
        let (start, end) = (cell(step.start_us), cell(step.end_us.max(step.start_us)));
        // One that is shorter than a cell is seen too.
        let bar = format!("|{}{}", " ".repeat(start), "#".repeat((end - start).max(1)));
        let took = format!("{:>7}", ms(step.end_us - step.start_us));
        rows.push(vec![step.side.clone(), format!("{:>7}", ms(step.start_us)), took, step.what.clone(), bar]);
    }
    print::table(&rows)
}

/// Milliseconds with one decimal.
fn ms(us: u64) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "{}.{}", us / 1000, us % 1000 / 100);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(milestones: &[(&str, &str, u64)]) -> Value {
        let milestones: Vec<Value> =
            milestones.iter().map(|(side, name, at_us)| json!({"side": side, "name": name, "at_us": at_us})).collect();
        json!({"began_ms": 0, "milestones": milestones})
    }

    #[test]
    fn each_side_goes_from_one_of_its_milestones_to_the_next() {
        let boot = boot(&[
            ("host", "configured", 2_000),
            ("host", "QEMU started", 10_000),
            ("host", "virtiofsd started", 12_000),
            ("guest", "kernel entered", 60_000),
            ("guest", "init", 80_000),
            ("guest", "own\x1b", 90_000),
            ("host", "hello received", 100_000),
        ]);
        let steps = steps(&boot);
        let spans: Vec<_> = steps.iter().map(|step| (step.what.as_str(), step.start_us, step.end_us)).collect();
        let wanted = [
            ("make the vsock device and the cgroup", 0, 2_000),
            ("start QEMU's process", 2_000, 10_000),
            ("start virtiofsd", 10_000, 12_000),
            ("QEMU and its firmware", 10_000, 60_000),
            ("kernel, up to PID 1", 60_000, 80_000),
            ("up to \"own^[\"", 80_000, 90_000),
            ("wait for the guest's hello", 12_000, 100_000),
        ];
        assert_eq!(spans, wanted);
        let text = bars(&steps, 100_000);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 8);
        assert!(lines[1].starts_with("host       0.0      2.0  make the vsock device and the cgroup"), "{text}");
        assert!(lines[4].contains(&format!("|{}{}", " ".repeat(4), "#".repeat(24))), "{text}");
        assert!(lines[7].ends_with(&format!("|{}{}", " ".repeat(5), "#".repeat(42))), "{text}");
    }

    #[test]
    fn what_makes_no_sense_is_still_drawn() {
        let odd = [("host", "b", 5), ("host", "a", 3), ("guest", "x", u64::MAX)];
        assert!(steps(&json!(null)).is_empty());
        let odd = steps(&boot(&odd));
        assert_eq!(bars(&odd, u64::MAX).lines().count(), 4);
        assert_eq!(bars(&odd, 0).lines().count(), 4);
    }
}
