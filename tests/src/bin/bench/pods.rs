//! What the kubelet waits for when it starts and ends a pod with one container.

use std::time::Instant;

use anyhow::Result;
use husk_protos::cri::PodSandboxConfig;
use husk_tests::artifacts::Version;
use husk_tests::cri::{Cri, Handler};

use crate::ctr::ms;
use crate::report::{Column, Report, Target};

/// The calls, in their order.
const CALLS: [&str; 3] = ["RunPodSandbox", "CreateContainer and StartContainer", "StopPodSandbox and RemovePodSandbox"];

/// Measures the calls.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    let cri = Cri::start("")?;
    report.about("containerd of the pods", Version::V2_4.name());
    let columns =
        [(Column::Husk, Handler::Husk), (Column::Sandboxer, Handler::HuskShim), (Column::Runc, Handler::Runc)];
    let mut samples = CALLS.map(|_| columns.map(|(column, _)| (column, Vec::new())));
    // The first round reads everything from the disk.
    for round in 0..=rounds {
        for (column, (_, handler)) in columns.into_iter().enumerate() {
            for (call, took) in one_pod(&cri, handler)?.into_iter().enumerate().filter(|_| round > 0) {
                samples[call][column].1.push(took);
            }
        }
    }
    for (call, samples) in CALLS.into_iter().zip(samples) {
        report.median(call, "ms", &samples, Target::Any);
    }
    Ok(())
}

/// Runs a pod with a container. Returns how long each of the calls took.
fn one_pod(cri: &Cri, handler: Handler) -> Result<[f64; CALLS.len()]> {
    let mut at = Instant::now();
    let mut lap = || ms(std::mem::replace(&mut at, Instant::now()).elapsed());
    let pod = cri.pod(handler, PodSandboxConfig::new())?;
    let sandbox = lap();
    pod.container("main", &["sleep", "100000"])?;
    let container = lap();
    pod.remove()?;
    Ok([sandbox, container, lap()])
}
