//! Clusters under stress: many pods at once while the daemons are killed, many pods one group after another, many
//! restarts in one pod, and a node that is short of memory. Each test has a cluster of its own, on which it must leave nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::command;
use husk_tests::process;
use husk_tests::table::Verdict;

use crate::cluster::{Cluster, NODE};
use crate::node::RUNC;
use crate::outcome::{Outcome, Outcomes, in_one_line};
use crate::pods;
use crate::traces::Traces;

/// Deadline for a group of pods to start, on two CPUs that emulate their VMs and have other work.
const START: Duration = Duration::from_secs(1800);
/// Deadline for a group of pods to end.
const END: Duration = Duration::from_secs(900);
/// Deadline for the kubelet to evict a pod: it looks at the node's memory every ten seconds, once containerd has answered.
const EVICTION: Duration = Duration::from_secs(300);
/// Deadline for one question.
const CALL: Duration = Duration::from_secs(120);
/// Between two questions to the API server, which needs the same CPUs as the pods.
const INTERVAL: Duration = Duration::from_millis(500);
/// The pods that start at once.
const AT_ONCE: usize = 20;
/// The pods that are cycled, and how many there are at a time.
const CYCLED: usize = 150;
const GROUP: usize = 10;

/// A pod with a volume. Without a request, it would get next to nothing of a busy machine's CPUs.
const POD: &str = r#"---
apiVersion: v1
kind: Pod
metadata: {name: NAME, labels: {app: stress}}
spec:
  runtimeClassName: CLASS
  nodeName: NODE
  terminationGracePeriodSeconds: 1
  containers:
  - name: box
    image: registry.k8s.io/e2e-test-images/busybox:1.29-2
    command: [sh, -c, "echo started >>/data/log; sleep 100000"]
    resources: {requests: {cpu: 60m}}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;

/// A test on a cluster with pods of one RuntimeClass. Returns what is worth a note.
struct Test {
    name: &'static str,
    run: fn(&mut Cluster, &str) -> Result<String>,
}

const TESTS: [Test; 4] = [
    Test { name: "20 pods start while containerd and the kubelet are killed, and are drained", run: kill_daemons },
    Test { name: "150 pods are cycled ten at a time", run: cycle },
    Test { name: "the containers of a pod restart 200 times", run: restart },
    Test { name: "a node that is short of memory evicts a pod, but no critical one", run: evict },
];

/// All memory of the node but 1 % is too little. This is a soft threshold, because the kubelet does not give pods the memory
/// below a hard one: the pods would not fit when it starts again, least of all those with a VM's overhead.
const SHORT_OF_MEMORY: &str = r#"evictionSoft: {memory.available: "99%"}
evictionSoftGracePeriod: {memory.available: 1s}
evictionMaxPodGracePeriod: 5
"#;

/// Runs the tests with `matching` in their names for each class. Returns the results in the order of the classes. The
/// daemons write their logs to folders in `logs`.
pub fn run(version: &str, classes: &[&str], matching: &str, logs: &Path) -> Result<Vec<Outcomes>> {
    let of_class = |class: &&str| -> Result<Outcomes> {
        let mut outcomes = Outcomes::new();
        for (number, test) in TESTS.iter().enumerate().filter(|(_, test)| test.name.contains(matching)) {
            let started = Instant::now();
            let result = run_one(test, version, class, &logs.join(format!("{class}-{number}")));
            let (verdict, why) = match &result {
                Ok(note) => (Verdict::Pass, note.clone()),
                Err(error) => (Verdict::Fail, format!("{error:#}")),
            };
            let (name, took) = (test.name, started.elapsed());
            writeln!(std::io::stderr(), "kubernetes: {class}: {name}: {verdict} in {took:.0?}\n{why}")?;
            let why = if result.is_ok() { String::new() } else { in_one_line(&why) };
            outcomes.insert(name.into(), Outcome { verdict, why });
        }
        Ok(outcomes)
    };
    classes.iter().map(of_class).collect()
}

fn run_one(test: &Test, version: &str, class: &str, logs: &Path) -> Result<String> {
    let mut cluster =
        Cluster::start(version, logs).with_context(|| format!("start a cluster; see {}", logs.display()))?;
    if class != RUNC {
        // The node has CPU time for ten pods with the overhead of the manifest.
        let patch = r#"{"overhead": {"podFixed": {"cpu": "10m"}}}"#;
        cluster.sh(&format!("kubectl patch runtimeclass {class} --patch '{patch}'"), CALL)?.ok()?;
    }
    // Pulls the image, and creates what the daemons keep after the first pod.
    create(&cluster, class, 0..1)?;
    await_ready(&cluster)?;
    delete_all(&cluster)?;
    let before = Traces::now(cluster.node())?;
    let note = (test.run)(&mut cluster, class)?;
    // A containerd that is killed before its first call to a shim of runc forgets the shim and its socket.
    let of_runc = |line: &str| line.contains("containerd-shim-runc-v2") || line.starts_with("file /run/containerd/s/");
    let left = before.added(cluster.node(), |line| class == RUNC && of_runc(line))?;
    ensure!(left.is_empty(), "left on the node:\n{left}");
    Ok(note)
}

fn create(cluster: &Cluster, class: &str, numbers: std::ops::Range<usize>) -> Result<()> {
    let pod =
        |number: usize| POD.replace("NAME", &format!("pod-{number}")).replace("CLASS", class).replace("NODE", NODE);
    cluster.apply(&numbers.map(pod).collect::<String>())
}

fn await_ready(cluster: &Cluster) -> Result<()> {
    let wait = format!("kubectl wait --for=condition=Ready pod --selector app=stress --timeout={}s", START.as_secs());
    let waited = cluster.sh(&wait, START + CALL)?.ok();
    waited.map(drop).with_context(|| described(cluster))
}

/// What explains a pod that does not start.
fn described(cluster: &Cluster) -> String {
    let events = cluster.sh("kubectl get pods; kubectl get events --field-selector type=Warning | tail -n 20", CALL);
    events.map_or_else(|error| format!("{error:#}"), |output| output.text())
}

fn delete_all(cluster: &Cluster) -> Result<()> {
    let delete = format!("kubectl delete pod --selector app=stress --timeout={}s", END.as_secs());
    cluster.sh(&delete, END + CALL)?.ok().map(drop).with_context(|| described(cluster))
}

/// The ids of the containers of all pods that are ready, by the names of the pods.
fn ready(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let path = r#"{range .items[*]}{.metadata.name} {.status.containerStatuses[0].ready} {.status.containerStatuses[0].containerID}{"\n"}{end}"#;
    let text = cluster.sh(&format!("kubectl get pods --selector app=stress -o jsonpath='{path}'"), CALL)?.ok()?.text();
    let ready = |line: &str| match line.split(' ').collect::<Vec<_>>()[..] {
        [name, "true", id] => Some((name.to_owned(), id.to_owned())),
        _ => None,
    };
    Ok(text.lines().filter_map(ready).collect())
}

/// Waits until so many pods are ready, and returns them.
fn await_count(cluster: &Cluster, count: usize) -> Result<BTreeMap<String, String>> {
    let waited = command::poll(INTERVAL, START, &format!("{count} pods are ready"), || {
        ready(cluster).map(|ready| (ready.len() >= count).then_some(ready)).transpose()
    });
    waited.and_then(|ready| ready).with_context(|| described(cluster))
}

/// Pods start at once. The daemons are killed when the first pods are being created, when a quarter and when two thirds of
/// the pods run, and while the node is drained.
fn kill_daemons(cluster: &mut Cluster, class: &str) -> Result<String> {
    create(cluster, class, 0..AT_ONCE)?;
    let machine = cluster.node().machine().pid();
    command::poll(INTERVAL, START, "two shims run", || {
        let shims = process::descendants(machine).into_iter().filter(|p| p.name.starts_with("containerd-shim"));
        (shims.count() >= 2).then_some(())
    })?;
    cluster.interrupt()?;
    let mut running = BTreeMap::new();
    for count in [AT_ONCE / 4, AT_ONCE * 2 / 3] {
        running.extend(await_count(cluster, count)?);
        cluster.interrupt()?;
    }
    await_ready(cluster)?;
    let now = ready(cluster)?;
    let lost: Vec<_> = running.iter().filter(|(name, id)| now.get(*name) != Some(*id)).collect();
    ensure!(lost.is_empty(), "pods that ran when the daemons were killed have other containers: {lost:?}");

    let drain = format!("kubectl drain {NODE} --force --delete-emptydir-data --timeout={}s", END.as_secs());
    let drained = std::thread::scope(|scope| {
        let mut command = cluster.command();
        command.args(["-c", &drain]);
        let drain = scope.spawn(|| command::run(command, None, END + CALL));
        let fewer = || ready(cluster).map(|ready| (ready.len() < AT_ONCE).then_some(())).transpose();
        let interrupted = command::poll(INTERVAL, END, "the drain has ended a pod", fewer)
            .and_then(|fewer| fewer)
            .and_then(|()| cluster.interrupt());
        let drained = drain.join().map_err(|_| anyhow::anyhow!("the drain panicked"))?;
        interrupted.and(drained)
    });
    drained?.ok().with_context(|| described(cluster))?;
    let rest = cluster.sh("kubectl get pods -o name", CALL)?.ok()?.text();
    ensure!(rest.is_empty(), "pods after the drain: {rest}");
    Ok(format!("{} containers ran through a kill of the daemons", running.len()))
}

/// Groups of pods start and end, one group after the other.
fn cycle(cluster: &mut Cluster, class: &str) -> Result<String> {
    let mut note = format!("before:\n{}", memory(cluster)?);
    for first in (0..CYCLED).step_by(GROUP) {
        create(cluster, class, first..first + GROUP)?;
        await_ready(cluster)?;
        if first == 0 {
            write!(note, "with {GROUP} pods:\n{}", memory(cluster)?)?;
        }
        delete_all(cluster)?;
    }
    write!(note, "after:\n{}", memory(cluster)?)?;
    Ok(note)
}

/// What the node's memory is used for, in KiB: by the daemons, by files in memory, which containerd's store is here, and
/// by the whole machine, on which other programs may run.
fn memory(cluster: &mut Cluster) -> Result<String> {
    let mut text = String::new();
    for (name, size) in cluster.daemons_memory()? {
        writeln!(text, "  {name} {size}")?;
    }
    let rest = "df --output=used /run | sed -n '2s/^ */  files /p'
        sed -n 's/^\\(MemAvailable\\|SUnreclaim\\|KernelStack\\): *\\([0-9]*\\) kB/  \\1 \\2/p' /proc/meminfo
        echo \"  processes $(ls -d /proc/[0-9]* | wc -l)\"";
    writeln!(text, "{}", cluster.sh(rest, CALL)?.ok()?.text())?;
    Ok(text)
}

/// The kubelet takes nearly all memory of the node for too little, and evicts what it may.
fn evict(cluster: &mut Cluster, class: &str) -> Result<String> {
    create(cluster, class, 0..1)?;
    let critical = POD.replace("spec:", "spec:\n  priorityClassName: system-node-critical");
    cluster.apply(&critical.replace("NAME", "critical").replace("CLASS", class).replace("NODE", NODE))?;
    await_ready(cluster)?;
    let before = ready(cluster)?;
    configure(cluster, &format!("cat >>FILE <<END\n{SHORT_OF_MEMORY}END"))?;
    let evicted = format!(
        "kubectl wait --for=jsonpath={{.status.reason}}=Evicted pod/pod-0 --timeout={}s >/dev/null
        kubectl get pod pod-0 -o jsonpath='{{.status.message}}'",
        EVICTION.as_secs()
    );
    let message = cluster.sh(&evicted, EVICTION + CALL)?.ok().with_context(|| described(cluster))?.text();
    ensure!(message.contains("low on resource: memory"), "{message}");
    let now = ready(cluster)?;
    ensure!(now.get("critical").is_some_and(|id| before.get("critical") == Some(id)), "before {before:?}, now {now:?}");
    configure(cluster, "sed -i /^eviction[SM]/d FILE")?;
    delete_all(cluster)?;
    Ok(message)
}

/// Changes the kubelet's configuration file, which `script` calls FILE, and starts the kubelet again.
fn configure(cluster: &mut Cluster, script: &str) -> Result<()> {
    cluster.sh(&script.replace("FILE", "/run/node/kubelet.yaml"), CALL)?.ok()?;
    cluster.interrupt()
}

/// Containers of one pod exit and are restarted.
fn restart(cluster: &mut Cluster, class: &str) -> Result<String> {
    let note =
        pods::script(cluster, "stress/restarts", class, "restarts", START)?.ok().with_context(|| described(cluster))?;
    cluster.sh("kubectl delete pod restarts --timeout=300s", END)?.ok()?;
    Ok(note.text())
}
