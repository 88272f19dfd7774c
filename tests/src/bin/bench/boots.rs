//! Many boots in a row: their duration, and whether each succeeds.

use anyhow::Result;
use husk_shim::vmm::Accel;

use crate::guest::{BOOT, Kit, floor_init};
use crate::report::{Column, Report, Target, percentile};

/// Boots the production machine `count` times and reports how many boots failed.
pub(crate) async fn run(count: usize, report: &mut Report) -> Result<()> {
    let kit = Kit::new()?;
    let mut times = Vec::new();
    let mut failures = Vec::new();
    for round in 1..=count {
        match kit.boot(Accel::Tcg).await {
            Ok((booted, took)) => {
                times.push(took.as_secs_f64() * 1000.0);
                booted.stop().await?;
            }
            Err(error) => failures.push(format!("boot {round}: {error:#}")),
        }
        // Without progress, hours of silence would look like a hang of this program.
        if round % 20 == 0 {
            eprintln!("{round} boots, {} failed", failures.len());
        }
    }
    report.row("boots", "", &[(Column::Husk, count as f64)], Target::Any);
    let name = format!("not ready within {} s, or failed", BOOT.as_secs());
    report.row(&name, "", &[(Column::Husk, failures.len() as f64)], Target::AtMost(0.0));
    for (name, percent) in [("fastest", 0), ("p50", 50), ("p90", 90), ("p99", 99), ("slowest", 100)] {
        report.row(name, "ms", &[(Column::Husk, percentile(&times, percent))], Target::Any);
    }
    failures.into_iter().for_each(|failure| report.note(failure));
    Ok(())
}

/// Measures the time from QEMU's start to the guest's hello, for husk's init and for the baseline.
pub(crate) async fn compare_with_floor(rounds: usize, report: &mut Report) -> Result<()> {
    let kit = Kit::new()?;
    let init = floor_init()?;
    let (mut husk, mut floor) = (Vec::new(), Vec::new());
    // Alternating, so that the machine's load affects both.
    for _ in 0..rounds {
        let (booted, took) = kit.boot(Accel::Tcg).await?;
        husk.push(took.as_secs_f64() * 1000.0);
        booted.stop().await?;
        let (_, took) = kit.boot_floor(Accel::Tcg, &init).await?;
        floor.push(took.as_secs_f64() * 1000.0);
    }
    let samples = [(Column::Husk, husk), (Column::Floor, floor)];
    report.distribution("QEMU starts -> guest ready", "ms", &samples, Target::Any);
    Ok(())
}
