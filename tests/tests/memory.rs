//! The guest's memory on the host: what a guest frees goes back, and a balloon takes what it could do without.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::command::poll;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::operator::{husk, husk_json};
use serde_json::Value;

/// For a guest that works off its balloon on a loaded machine.
const SOON: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_millis(500);
/// What a program uses, MiB.
const USED: u64 = 160;
/// What the guest is to get by with, of 512 MiB.
const TARGET: u64 = 200;

fn memory(containerd: &Containerd, container: &Container<'_>) -> Result<Value> {
    Ok(husk_json(containerd, &["status", "--json", container.id()])?["memory"].clone())
}

fn on_host(containerd: &Containerd, container: &Container<'_>) -> Result<u64> {
    let memory = memory(containerd, container)?;
    memory["on_host_mib"].as_u64().with_context(|| format!("{memory}"))
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn memory_that_programs_have_freed_goes_back_to_the_host() -> Result<()> {
    for board in ["microvm", "q35"] {
        let configured = Configured::start(&format!("machine = \"{board}\"\ntcg_cache_mib = 96\n"))?;
        let containerd = &configured.containerd;
        let big = ["--mount", "type=tmpfs,src=tmpfs,dst=/big,options=size=500m"];
        let target = format!("io.husk.balloon_target_mib={TARGET}");
        let flags = [&big[..], &["--annotation", &target]].concat();
        let container = containerd.detached(&flags, "memory", &["sleep", "1000"])?;
        let status = husk_json(containerd, &["status", "--json", container.id()])?;
        if status["machine"]["accel"] != "Kvm" {
            ensure!(status["machine"]["cache_mib"] == 96, "{board}: {status:#}");
        }

        // The target applies without being asked for again, and no program notices.
        let inflated = poll(INTERVAL, SOON, "the balloon has its size", || {
            let memory = memory(containerd, &container).ok()?;
            (memory["balloon_mib"].as_u64()? >= 512 - TARGET).then_some(memory)
        })?;
        ensure!(inflated["balloon_target_mib"] == TARGET, "{board}: {inflated}");

        let before = on_host(containerd, &container)?;
        container.script(&format!("dd if=/dev/zero of=/big/file bs=1M count={USED}"))?;
        let used = on_host(containerd, &container)?;
        // The balloon gives back what the guest needs beyond its target.
        ensure!(used >= before + USED / 2, "{board}: {before} MiB before, {used} MiB in use");
        container.script("rm /big/file")?;
        poll(INTERVAL, SOON, "the guest has given its memory back", || {
            (on_host(containerd, &container).ok()? <= used - USED / 2).then_some(())
        })?;

        // More than the target: the guest takes it from the balloon instead of killing the program.
        container.script(&format!("dd if=/dev/zero of=/big/file bs=1M count={}", TARGET + 100))?;
        let page = husk(containerd, &["status", container.id()])?.ok()?.text();
        let line = page.lines().find(|line| line.starts_with("memory ")).with_context(|| page.clone())?;
        let ends = format!("MiB in the balloon, for a target of {TARGET} MiB");
        ensure!(line.ends_with(&ends), "{line}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_balloon_and_huge_pages_exclude_each_other() -> Result<()> {
    let configured = Configured::start("hugepages = true\n")?;
    let containerd = &configured.containerd;
    let flags = ["--annotation", "io.husk.balloon_target_mib=200"];
    let error = containerd.run(&flags, &containerd.id("huge"), &["true"]).expect_code(1)?.errors();
    let expected = "annotation io.husk.balloon_target_mib = \"200\": a VM whose memory consists of huge pages";
    ensure!(error.contains(expected), "{error}");
    Ok(())
}
