//! What a disk adds to the creation of a container in a VM that runs: the difference between two consecutive creations, with
//! volumes and without.

use std::time::Instant;

use anyhow::Result;
use husk_tests::bundle;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::shim::{Shim, Streams};
use serde_json::{Value, json};

use crate::cpu::Cpu;
use crate::ctr::ms;
use crate::report::{Column, Report, Target};

/// Volumes of the container that has some.
const DISKS: usize = 8;
/// What each may add, ms.
const MOST: f64 = 10.0;

/// Measures pairs of creations.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let containerd =
        Containerd::with(Setup { husk: format!("volume_dirs = [{:?}]\n", folder.path()), ..Setup::default() })?;
    let volume = |number: usize| json!({"source": folder.path().join(number.to_string()), "destination": format!("/v/{number}"), "size_mib": 16});
    let spec = |pod: &str, id: &str, volumes: usize| {
        let mut spec = bundle::spec(id, &["sleep", "100000"]);
        let kind = if pod == id { "sandbox" } else { "container" };
        let volumes = Value::from((0..volumes).map(volume).collect::<Vec<_>>()).to_string();
        spec["annotations"] = json!({
            "io.kubernetes.cri.sandbox-id": pod, "io.kubernetes.cri.container-type": kind, "io.husk.volumes": volumes,
        });
        spec
    };
    let pod = containerd.id("disks");
    let pause = Shim::running(&containerd, &pod, &spec(&pod, &pod, 0))?;
    let create = |volumes: usize| -> Result<(f64, f64)> {
        let id = containerd.id("disks");
        let shim = Shim::start(&containerd, &id, &spec(&pod, &id, volumes))?;
        let (started, cpu) = (Instant::now(), Cpu::start(&containerd)?);
        shim.create(&Streams::default())?;
        let taken = (ms(started.elapsed()), cpu.used()?);
        shim.task.start(&id, "")?;
        shim.remove()?;
        Ok(taken)
    };
    // Formats the volumes.
    create(DISKS)?;
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (with, without) = (create(DISKS)?, create(0)?);
        wall.push((with.0 - without.0) / DISKS as f64);
        cpu.push((with.1 - without.1) / DISKS as f64);
    }
    pause.remove()?;
    report.median("added to a create by each of 8 disks", "ms", &[(Column::Husk, wall)], Target::AtMost(MOST));
    report.mean("  its CPU time", "ms", &[(Column::Husk, cpu)], Target::Any);
    Ok(())
}
