//! `husk boot-profile`: shows as bars where the time of a boot went.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::{Result, bail};
use husk_protos::system::BootStep;
use husk_shim::state::facts::{GuestMilestone, HostMilestone, Milestone, Reached, Side};
use serde::Serialize;

use crate::find;
use crate::print::{self, or_dash, shown};

/// Width of the bars, characters.
const WIDTH: u64 = 48;

pub(crate) fn run(id: &str, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let status = find::status(&state).status;
    let boot = status.boot.unwrap_or_default();
    let steps = steps(&boot.milestones);
    if steps.is_empty() {
        bail!(
            "no boot of {:?} has been recorded; its VM is {}: `husk status {}` shows how it got there",
            state.sandbox(),
            or_dash(status.summary.state),
            state.sandbox()
        );
    }
    let total_us = total_us(&steps);
    let mut out = io::stdout().lock();
    if as_json {
        let profile = Profile { sandbox: state.sandbox(), began: &boot.began, total_us, steps: &steps };
        print::json(&mut out, &profile)?;
        return Ok(());
    }
    let last = steps.iter().max_by_key(|step| step.end_us).map(|step| &step.milestone);
    writeln!(
        out,
        "boot of {} at {}: {} ms until `{}`",
        shown(state.sandbox()),
        shown(&boot.began),
        ms(total_us),
        or_dash(last)
    )?;
    out.write_all(bars(&steps).as_bytes())?;
    Ok(())
}

#[derive(Serialize)]
struct Profile<'a> {
    sandbox: &'a str,
    began: &'a str,
    total_us: u64,
    steps: &'a [Step],
}

/// The time between two milestones of the same side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Step {
    side: Side,
    /// The milestone at the end.
    milestone: String,
    what: String,
    start_us: u64,
    end_us: u64,
}

/// What happens before a milestone. Without a wildcard, so that a new milestone cannot be forgotten here.
fn what(reached: &Reached) -> String {
    let known = match reached {
        Reached::Host(milestone) => match milestone {
            HostMilestone::Configured => "create the vsock device and the cgroup",
            HostMilestone::VmmStarted => "start QEMU's process",
            HostMilestone::VirtiofsdStarted => "start virtiofsd",
            HostMilestone::HelloReceived => "wait for the guest's hello",
            HostMilestone::GuestConnected => "connect to the guest's services",
            HostMilestone::EventsSubscribed => "subscribe to the guest's events",
        },
        Reached::Guest(GuestMilestone::KernelEntered) => "QEMU and its firmware",
        Reached::Guest(GuestMilestone::Step(step)) => match step {
            BootStep::INIT => "kernel, up to PID 1",
            BootStep::MOUNTS => "init: mounts",
            BootStep::CLOCK => "init: command line, log, clock",
            BootStep::CGROUPS => "init: cgroups",
            BootStep::SYSTEM => "init: loopback, host name, limits, entropy",
            BootStep::EXTRAS => "init: write the extras",
            BootStep::LISTENING => "init: services listen",
            BootStep::READY => "init: connect to the host",
            BootStep::BOOT_STEP_UNSPECIFIED => "init: a step that husk does not know",
        },
        Reached::Other { name, .. } => return format!("up to {:?}", shown(name)),
    };
    known.to_owned()
}

/// The steps of a boot, in the order in which they ended.
pub(crate) fn steps(milestones: &[Milestone]) -> Vec<Step> {
    // The guest's first step begins when the machine starts. Its clock begins later, with its kernel.
    let started = milestones.iter().find(|one| one.reached == Reached::Host(HostMilestone::VmmStarted));
    let (mut host, mut guest) = (0, started.map_or(0, |started| started.at_us));
    let step = |Milestone { reached, at_us }: &Milestone| {
        let before = match reached.side() {
            Side::Host => &mut host,
            Side::Guest => &mut guest,
        };
        let start_us = std::mem::replace(before, *at_us).min(*at_us);
        let milestone = shown(&reached.to_string());
        Step { side: reached.side(), milestone, what: what(reached), start_us, end_us: *at_us }
    };
    milestones.iter().map(step).collect()
}

fn total_us(steps: &[Step]) -> u64 {
    steps.iter().map(|step| step.end_us).max().unwrap_or(0)
}

/// A line for each step: its side, its start, its duration, and both as a bar.
pub(crate) fn bars(steps: &[Step]) -> String {
    let total_us = total_us(steps);
    let cell = |us: u64| (us.saturating_mul(WIDTH).checked_div(total_us).unwrap_or(0)).min(WIDTH - 1) as usize;
    let mut rows = vec![["SIDE", "FROM MS", "TOOK MS", "WHAT", "|"].map(str::to_owned).to_vec()];
    for step in steps {
        let (start, end) = (cell(step.start_us), cell(step.end_us));
        // At least one character, or a short step would be invisible.
        let bar = format!("|{}{}", " ".repeat(start), "#".repeat((end - start).max(1)));
        let took = format!("{:>7}", ms(step.end_us - step.start_us));
        let side = step.side.name().to_owned();
        rows.push(vec![side, format!("{:>7}", ms(step.start_us)), took, step.what.clone(), bar]);
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
    use husk_protos::system::{Hello, Milestone as GuestReport};
    use husk_shim::state::Boot;

    use super::*;

    fn host(milestone: HostMilestone, at_us: u64) -> Milestone {
        Milestone { reached: Reached::Host(milestone), at_us }
    }

    fn guest(step: BootStep, at_us: u64) -> Milestone {
        Milestone { reached: Reached::Guest(GuestMilestone::Step(step)), at_us }
    }

    fn other(side: Side, name: &str, at_us: u64) -> Milestone {
        Milestone { reached: Reached::Other { side, name: name.into() }, at_us }
    }

    #[test]
    fn each_side_continues_from_its_last_milestone() {
        let boot = [
            host(HostMilestone::Configured, 2_000),
            host(HostMilestone::VmmStarted, 10_000),
            host(HostMilestone::VirtiofsdStarted, 12_000),
            Milestone { reached: Reached::Guest(GuestMilestone::KernelEntered), at_us: 60_000 },
            guest(BootStep::INIT, 80_000),
            other(Side::Guest, "own\x1b", 90_000),
            host(HostMilestone::HelloReceived, 100_000),
        ];
        let steps = steps(&boot);
        let spans: Vec<_> = steps.iter().map(|step| (step.what.as_str(), step.start_us, step.end_us)).collect();
        let expected = [
            ("create the vsock device and the cgroup", 0, 2_000),
            ("start QEMU's process", 2_000, 10_000),
            ("start virtiofsd", 10_000, 12_000),
            ("QEMU and its firmware", 10_000, 60_000),
            ("kernel, up to PID 1", 60_000, 80_000),
            ("up to \"own^[\"", 80_000, 90_000),
            ("wait for the guest's hello", 12_000, 100_000),
        ];
        assert_eq!(spans, expected);
        let text = bars(&steps);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 8);
        assert!(lines[1].starts_with("host       0.0      2.0  create the vsock device and the cgroup"), "{text}");
        assert!(lines[4].contains(&format!("|{}{}", " ".repeat(4), "#".repeat(24))), "{text}");
        assert!(lines[7].ends_with(&format!("|{}{}", " ".repeat(5), "#".repeat(42))), "{text}");
    }

    /// A boot whose guest reports every step that the init has, 10 ms apart.
    fn boot_with_all_steps() -> Boot {
        let order = [
            BootStep::INIT,
            BootStep::MOUNTS,
            BootStep::CLOCK,
            BootStep::CGROUPS,
            BootStep::SYSTEM,
            BootStep::EXTRAS,
            BootStep::LISTENING,
            BootStep::READY,
        ];
        let report = |(step, n): (BootStep, u64)| GuestReport {
            step: step.into(),
            boottime_ns: n * 10_000_000,
            ..Default::default()
        };
        let timeline = order.into_iter().zip(1..).map(report).collect();
        let mut boot = Boot::begin();
        boot.reached(HostMilestone::Configured);
        boot.reached(HostMilestone::VmmStarted);
        boot.reached(HostMilestone::VirtiofsdStarted);
        boot.hello_received(&Hello { timeline, ..Default::default() });
        boot.reached(HostMilestone::GuestConnected);
        boot.reached(HostMilestone::EventsSubscribed);
        boot
    }

    #[test]
    fn every_step_of_a_boot_with_extras_has_a_description() {
        let steps = steps(&boot_with_all_steps().milestones);
        let text = bars(&steps);
        assert!(text.contains("init: write the extras"), "{text}");
        assert!(!text.contains("up to \"") && !text.contains("does not know"), "{text}");
        assert_eq!(steps.len(), HostMilestone::ALL.len() + 1 + 8);
    }

    #[test]
    fn the_clocks_time_is_attributed_to_the_step_before_the_cgroups() {
        let boot = [
            guest(BootStep::INIT, 1_000),
            guest(BootStep::MOUNTS, 3_000),
            guest(BootStep::CLOCK, 10_000),
            guest(BootStep::CGROUPS, 11_000),
        ];
        let took: Vec<_> =
            steps(&boot).into_iter().skip(1).map(|step| (step.what, step.end_us - step.start_us)).collect();
        let expected = [("init: mounts", 2_000), ("init: command line, log, clock", 7_000), ("init: cgroups", 1_000)];
        assert_eq!(took, expected.map(|(what, took)| (what.to_owned(), took)));
    }

    #[test]
    fn json_has_the_names_of_earlier_versions() {
        let steps = steps(&[host(HostMilestone::VmmStarted, 7)]);
        let profile = Profile { sandbox: "web", began: "1970-01-01T00:00:00.000Z", total_us: 7, steps: &steps };
        let expected = serde_json::json!({
            "sandbox": "web", "began": "1970-01-01T00:00:00.000Z", "total_us": 7,
            "steps": [{"side": "host", "milestone": "QEMU started", "what": "start QEMU's process", "start_us": 0,
                "end_us": 7}],
        });
        assert_eq!(serde_json::to_value(&profile).unwrap(), expected);
    }

    #[test]
    fn nonsense_is_drawn_without_a_panic() {
        assert!(steps(&[]).is_empty());
        let odd = [other(Side::Host, "b", 5), other(Side::Host, "a", 3), other(Side::Guest, "x", u64::MAX)];
        assert_eq!(bars(&steps(&odd)).lines().count(), 4);
        assert_eq!(bars(&steps(&odd[..0])).lines().count(), 1);
        assert_eq!(bars(&steps(&[other(Side::Host, "a", 0)])).lines().count(), 2);
    }
}
