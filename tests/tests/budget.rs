//! What the init costs: its size, its memory, its boot, and that it does nothing when nothing is asked of it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_protos::system::BootStep;
use husk_tests::guest::{Guest, config, spec};
use husk_tests::vm::{Config, workspace};

const MIB: u64 = 1 << 20;

/// Under the instruction clock a nanosecond is an instruction.
async fn boot_counted() -> Result<Guest> {
    Guest::boot_with(Config { instruction_clock: true, ..config()? }).await
}

#[test]
fn the_init_is_at_most_5_mib() -> Result<()> {
    let size = std::fs::metadata(workspace().join("out/husk-init"))?.len();
    eprintln!("{size} bytes");
    ensure!(size <= 5 * MIB, "{size} bytes");
    Ok(())
}

#[tokio::test]
async fn from_its_first_instruction_to_ready_the_init_needs_at_most_8_million() -> Result<()> {
    let guest = boot_counted().await?;
    let mut last = None;
    for milestone in &guest.hello.timeline {
        let step = milestone.boottime_ns - last.unwrap_or(milestone.boottime_ns);
        eprintln!("{:>12?} {:>12} +{step}", milestone.step.enum_value_or_default(), milestone.boottime_ns);
        last = Some(milestone.boottime_ns);
    }
    let at = |step: BootStep| -> Result<u64> {
        let milestone = guest.hello.timeline.iter().find(|milestone| milestone.step == step.into());
        Ok(milestone.with_context(|| format!("no milestone {step:?}"))?.boottime_ns)
    };
    let cost = at(BootStep::READY)? - at(BootStep::INIT)?;
    ensure!(cost <= 8_000_000, "{cost} instructions");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_idle_init_holds_at_most_4_mib_and_sleeps() -> Result<()> {
    // Counted, and so with a clock that does not wait: whoever sleeps is woken at once, and an idle guest is through minutes in seconds,
    // whatever else the machine does.
    let guest = boot_counted().await?;
    ensure!(guest.run("c", &spec(&["true"])).await?.0 == 0);
    // A container that does nothing gives it nothing to do.
    guest.create("idle", &spec(&["sleep", "1000000"]), "").await?;
    guest.start("idle", "").await?;
    let before = guest.info().await?;
    eprintln!("RSS {} KiB, {} fds", before.init_rss_bytes / 1024, before.init_open_fds);
    ensure!(before.init_rss_bytes <= 4 * MIB, "{} bytes", before.init_rss_bytes);
    // The thing that is measured, not a wait for it.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = guest.info().await?;
    let idle = Duration::from_nanos(after.uptime_ns - before.uptime_ns);
    let woken = after.init_context_switches - before.init_context_switches;
    eprintln!("{woken} switches in {idle:?} of the guest's time");
    ensure!(idle > Duration::from_secs(600), "the guest's clock has moved by {idle:?} only");
    // The question itself takes a few, and the ends of the container's connections.
    ensure!(woken <= 10, "{woken} switches in {idle:?}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn what_a_container_costs_is_known() -> Result<()> {
    let guest = boot_counted().await?;
    // What the page cache and the kernel's caches hold from the second time on.
    ensure!(guest.run("first", &spec(&["true"])).await?.0 == 0);
    let before = guest.info().await?;
    let begin = guest.info().await?;
    guest.create("c", &spec(&["true"]), "").await?;
    let created = guest.info().await?;
    guest.start("c", "").await?;
    ensure!(guest.wait("c", "").await? == 0);
    let ended = guest.info().await?;
    guest.delete("c", "").await?;
    let deleted = guest.info().await?;
    eprintln!("thousand instructions   init and workers   container   until then");
    for (name, from, to) in [
        ("nothing", &before, &begin),
        ("create", &begin, &created),
        ("start, run, exit", &created, &ended),
        ("delete", &ended, &deleted),
    ] {
        eprintln!(
            "{name:>22} {:>17} {:>11} {:>12}",
            to.init_cpu_usec - from.init_cpu_usec,
            to.containers_cpu_usec as i64 - from.containers_cpu_usec as i64,
            (to.uptime_ns - from.uptime_ns) / 1000
        );
    }
    guest.shut_down().await?;
    Ok(())
}
