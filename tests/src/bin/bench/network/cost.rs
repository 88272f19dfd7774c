//! What a network adds to the start of a container.

use anyhow::{Context, Result};
use husk_protos::system::BootStep;
use husk_tests::cni::{Network, Node};
use husk_tests::guest::{Guest, MAC, config};
use husk_tests::vm::VmConfig;

use crate::ctr::{BOTH, ms};
use crate::report::{Column, Report, Target};

/// Limits of the issue that introduced networking.
const MAX_RUN_MS: f64 = 15.0;
const MAX_READY_MINSTR: f64 = 0.5;
/// What it took when this limit was set, and a quarter.
const MAX_CONFIGURE_MINSTR: f64 = 2.5;

/// Compares a `ctr run` in a pod's namespace with one without a namespace of the host.
pub(super) fn of_a_run(node: &Node<'_>, networks: &[Network], rounds: usize, report: &mut Report) -> Result<()> {
    let containerd = node.containerd;
    let mut all = [Vec::new(), Vec::new(), Vec::new()];
    for (column, runtime) in BOTH {
        let run = |flags: &[&str]| {
            let ctr = containerd.ctr(["run", "--rm", "--runtime", runtime.name()]).args(flags);
            Ok::<_, anyhow::Error>(ms(ctr.arg(containerd.image()).arg(containerd.id("run")).arg("true").ok()?.took))
        };
        // The first run reads everything from the disk.
        run(&[])?;
        let mut samples = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..rounds {
            // A new one each time: the last round's VM may still be ending in its namespace.
            let pod = node.pod(networks)?;
            let namespace = format!("network:{}", pod.netns());
            let (none, flags): (&[&str], &[&str]) = (&[], &["--with-ns", &namespace]);
            // The second run of a round competes with the end of the first one's VM, so each has its turn.
            let (without, with) = if round % 2 == 0 {
                let without = run(none)?;
                (without, run(flags)?)
            } else {
                let with = run(flags)?;
                (run(none)?, with)
            };
            for (samples, value) in samples.iter_mut().zip([without, with, with - without]) {
                samples.push(value);
            }
        }
        for (all, samples) in all.iter_mut().zip(samples) {
            all.push((column, samples));
        }
    }
    let [without, with, added] = all;
    report.median("ctr run --rm true, without a namespace", "ms", &without, Target::Any);
    report.median("ctr run --rm true, in a pod's namespace", "ms", &with, Target::Any);
    report.median("  added by the namespace", "ms", &added, Target::AtMost(MAX_RUN_MS));
    Ok(())
}

/// Millions of instructions of one boot.
struct Boot {
    to_init: f64,
    to_ready: f64,
    /// The configuration of the network, by PID 1.
    configure: f64,
}

/// Counts the guest's instructions with and without a NIC.
pub(super) async fn in_the_guest(report: &mut Report) -> Result<()> {
    let (without, with) = (boot(false).await?, boot(true).await?);
    let mut row = |name: &str, value: f64, target| report.row(name, "M instr", &[(Column::Husk, value)], target);
    row("kernel's clock starts -> PID 1, added by a NIC", with.to_init - without.to_init, Target::Any);
    let ready = with.to_ready - without.to_ready;
    row("PID 1 -> ready, added by a NIC", ready, Target::AtMost(MAX_READY_MINSTR));
    row("configuration of the network after that", with.configure, Target::AtMost(MAX_CONFIGURE_MINSTR));
    Ok(())
}

async fn boot(nic: bool) -> Result<Boot> {
    let nics = if nic { vec![MAC] } else { Vec::new() };
    let guest = Guest::boot_with(VmConfig { instruction_clock: true, nics, ..config()? }).await?;
    let at = |step: BootStep| {
        let milestone = guest.hello.timeline.iter().find(|milestone| milestone.step == step.into());
        // With the instruction clock, one instruction takes a nanosecond.
        Ok::<_, anyhow::Error>(milestone.with_context(|| format!("no milestone {step:?}"))?.boottime_ns as f64 / 1e6)
    };
    let (to_init, to_ready) = (at(BootStep::INIT)?, at(BootStep::READY)? - at(BootStep::INIT)?);
    let configure = if nic { guest.cost_of_configuring().await? as f64 / 1e6 } else { 0.0 };
    guest.shut_down().await?;
    Ok(Boot { to_init, to_ready, configure })
}
