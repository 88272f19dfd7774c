//! A machine that its guest has taken over (`tests/src/bin/hostile-vmm.rs`) attacks virtiofsd, which runs with husk's
//! arguments and in its jail. Whatever virtiofsd does then, the VM fails in time, with a cause, its helpers end, and
//! nothing is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::containerd::{Configured, Containerd, ENV, husk_config};
use husk_tests::leftovers::Leftovers;
use husk_tests::operator;

/// How long a guest may take to connect, in ms. This one never does: it is short where virtiofsd does not fail before.
const BOOT: u64 = 5000;
const SILENT: u64 = 1000;
/// Longer than that, and all that follows, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
/// The most bytes of a sandbox's state: two files of 512 KiB for each of two helpers, and some lines.
const STATE_MAX: u64 = 5 << 19;
/// The most lines in containerd's log for one attack, and characters of an error.
const LINES_MAX: usize = 100;
const TEXT_MAX: usize = 4000;

/// What the machine does, how long the boot may take, and what the error says. Where it says nothing certain, virtiofsd
/// either fails or goes on, as it likes.
const ATTACKS: [(&str, u64, &str); 17] = [
    // The fault of virtiofsd 1.14 that filled /run: an error for each turn of an endless loop.
    ("index-jump", BOOT, "virtiofsd prints errors without end"),
    ("silence", SILENT, "the VM was not ready"),
    ("half-message", SILENT, "the VM was not ready"),
    ("huge-message", BOOT, ""),
    ("garbage", BOOT, ""),
    ("memory-beyond-the-file", SILENT, ""),
    ("overlapping-memory", BOOT, ""),
    ("many-descriptors", BOOT, ""),
    ("queue-outside-memory", BOOT, ""),
    ("descriptor-loop", BOOT, ""),
    ("descriptor-outside-table", BOOT, ""),
    ("sizes", BOOT, ""),
    ("indirect-loop", BOOT, ""),
    ("request-that-lies", SILENT, ""),
    ("noise", BOOT, ""),
    ("memory-that-shrinks", BOOT, "virtiofsd exited"),
    ("queue-that-moves", BOOT, ""),
];

/// The largest size of a folder while `work` runs.
fn largest<T>(folder: &Path, work: impl FnOnce() -> T) -> (T, u64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut largest = 0;
            while !done.load(Ordering::Relaxed) {
                // Files come and go.
                let entries = fs::read_dir(folder).into_iter().flatten().flatten();
                largest = largest.max(entries.flat_map(|entry| entry.metadata()).map(|metadata| metadata.len()).sum());
                std::thread::sleep(Duration::from_millis(5));
            }
            largest
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, watch.join().unwrap_or(u64::MAX))
    })
}

fn survive(containerd: &Containerd, attack: &str, expected: &str) -> Result<()> {
    let before = Leftovers::now(containerd);
    let (id, began) = (containerd.id(attack), Instant::now());
    let folder = operator::folder(containerd, &id);
    let (ran, size) = largest(&folder, || containerd.run(&[], &id, &["true"]).deadline(SOON).output());
    let (ran, took) = (ran?, began.elapsed());
    let errors = ran.errors();
    eprintln!("{attack}: {} KiB, {} ms: {}", size / 1024, took.as_millis(), errors.trim_end());
    ensure!(ran.code() != 0, "the container was created");
    ensure!(errors.contains(expected), "no {expected:?}");
    // The machine itself goes on until the host ends it.
    ensure!(!errors.contains("QEMU exited") && !errors.contains("hostile-vmm:"), "the attack has failed");
    ensure!(errors.chars().count() <= TEXT_MAX, "{} characters", errors.chars().count());
    ensure!(size <= STATE_MAX, "{size} bytes in {}", folder.display());
    let lines = containerd.logged(&id);
    ensure!(lines.len() <= LINES_MAX, "{} lines in containerd's log: {:?}", lines.len(), lines.first());
    before.expect_none_since(containerd)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_machine_that_attacks_virtiofsd_fails_in_time_and_leaves_nothing_behind() -> Result<()> {
    let place = tempfile::tempdir()?;
    // The machine's user is nobody's.
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
    let program: PathBuf = place.path().join("hostile-vmm");
    fs::copy(env!("CARGO_BIN_EXE_hostile-vmm"), &program)?;
    let config = |boot: u64| husk_config(&format!("qemu = {program:?}\nboot_timeout_ms = {boot}\n"));
    let configured = Configured::start("")?;
    let containerd = &configured.containerd;
    let [(_, file)] = ENV;
    // The first use of containerd's namespace creates directories that remain.
    fs::write(containerd.path(file), config(SILENT))?;
    fs::write(place.path().join("attack"), "silence")?;
    ensure!(containerd.run(&[], &containerd.id("first"), &["true"]).output()?.code() != 0, "the machine has booted");
    for (attack, boot, expected) in ATTACKS {
        fs::write(containerd.path(file), config(boot))?;
        fs::write(place.path().join("attack"), attack)?;
        survive(containerd, attack, expected).with_context(|| format!("{attack}: {}", containerd.log_tail()))?;
    }
    Ok(())
}
