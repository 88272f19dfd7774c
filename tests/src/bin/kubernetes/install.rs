//! husk's installation by DaemonSets: a script follows docs/kubernetes.md on a cluster without husk, and this program
//! restarts containerd in the place of systemctl.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::artifacts::repository;
use husk_tests::command::{self, Output};
use husk_tests::table::Verdict;

use crate::cluster::Cluster;
use crate::node::RUNC;
use crate::outcome::{Outcome, Outcomes, in_one_line};
use crate::pods;
use crate::traces::Traces;

/// The test's name in the table.
const NAME: &str = "husk is installed by a DaemonSet, runs a pod, and is removed";
/// Deadline for the whole script, on two CPUs that emulate the pod's VM.
const DEADLINE: Duration = Duration::from_secs(1200);
/// Deadline for the image, for the preparation of the node, and for a look at what went wrong.
const PREPARE: Duration = Duration::from_secs(300);
/// Between two looks for a request to restart containerd.
const INTERVAL: Duration = Duration::from_millis(200);
/// The request of the node's systemctl, which waits until the file is gone.
const REQUEST: &str = "/run/node/restart";
/// containerd creates this folder for the first sandbox of a shim, and keeps it.
const OF_CONTAINERD: &str = "folder /run/node/state/io.containerd.sandbox.controller.v1.shim/k8s.io";

/// Runs the test for each class of husk. That of runc needs no installation.
pub fn run(version: &str, classes: &[&str], logs: &Path) -> Result<Vec<Outcomes>> {
    fs::create_dir_all(logs).with_context(|| format!("create {}", logs.display()))?;
    let image = logs.join("husk-node.tar");
    let mut build = Command::new(repository().join("setup/node-image"));
    build.env("HUSK_NODE_IMAGE", &image);
    command::run(build, None, PREPARE)?.ok().context("build the image of the DaemonSets")?;
    let of_class = |class: &&str| -> Result<Outcomes> {
        let started = Instant::now();
        let (verdict, why) = match *class {
            RUNC => (Verdict::Skip, "runc needs no installation".into()),
            class => match run_one(version, class, &image, &logs.join(class)) {
                Ok(()) => (Verdict::Pass, String::new()),
                Err(error) => (Verdict::Fail, format!("{error:#}")),
            },
        };
        writeln!(std::io::stderr(), "kubernetes: {class}: {NAME}: {verdict} in {:.0?}\n{why}", started.elapsed())?;
        Ok([(NAME.into(), Outcome { verdict, why: in_one_line(&why) })].into())
    };
    classes.iter().map(of_class).collect()
}

fn run_one(version: &str, class: &str, image: &Path, logs: &Path) -> Result<()> {
    let mut cluster =
        Cluster::without_husk(version, logs).with_context(|| format!("start a cluster; see {}", logs.display()))?;
    pods::script(&cluster, "install/node", RUNC, "other", PREPARE)?.ok()?;
    let before = Traces::now(cluster.node())?;
    let mut command = pods::command(&cluster, "install/daemonset", class, "demo");
    command.env("IMAGE", image);
    let ran = std::thread::scope(|scope| {
        let script = scope.spawn(|| command::run(command, None, DEADLINE));
        while !script.is_finished() {
            restart_if_requested(&mut cluster)?;
            std::thread::sleep(INTERVAL);
        }
        script.join().map_err(|_| anyhow!("the script panicked"))?
    });
    let output = ran.and_then(Output::ok).map_err(|error| anyhow!("{error:#}\n{}", described(&cluster)))?;
    fs::write(logs.join("output"), output.errors()).with_context(|| format!("write to {}", logs.display()))?;
    let left = before.added(cluster.node(), |line| line == OF_CONTAINERD)?;
    ensure!(left.is_empty(), "left on the node:\n{left}");
    Ok(())
}

fn restart_if_requested(cluster: &mut Cluster) -> Result<()> {
    let request = cluster.node().machine().path(REQUEST);
    if request.exists() {
        cluster.restart_containerd()?;
        fs::remove_file(&request).with_context(|| format!("remove {}", request.display()))?;
    }
    Ok(())
}

/// What explains a DaemonSet whose pod does not become ready.
fn described(cluster: &Cluster) -> String {
    let script = "kubectl get pods --all-namespaces
        kubectl --namespace husk-system describe pods
        kubectl --namespace husk-system logs --selector app.kubernetes.io/name --all-containers --prefix";
    cluster.sh(script, PREPARE).map_or_else(|error| format!("{error:#}"), |output| output.text() + &output.errors())
}
