//! Runs the suites with runc and with husk, and compares the results with the checked-in table.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use husk_protos::lock::lock;
use husk_tests::expected::Expected;
use husk_tests::table::{Name, Results, Table, Verdict};

use crate::node::RUNC;
use crate::outcome::Outcomes;
use crate::{cluster, critest, install, node, pods, stress};

/// First lines of the table.
const HEADER: &str = "\
# What Kubernetes' tests say of runc and of husk: critest, and what kubectl prints of pods on a cluster. husk runs with a
# pause container, and, in the suites that end in `-shim`, with containerd's Sandbox API. `./task test-kubernetes` compares
# a run with this table; `./task test-kubernetes -- --update` writes it. Every row that is not `pass pass` says why, in the
# last column. `varies: ` there means that the result depends on the machine's speed: such a test is run, but not compared.
# suite\ttest\trunc\thusk\treason
";
/// The default version of Kubernetes.
const NEWEST: &str = "1.37";

/// Where tests come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Critest,
    Pods,
    Install,
    Stress,
}

/// The tests of one source with one of husk's runtime handlers. runc's results count for all suites of a source.
#[derive(Debug, Clone, Copy)]
struct Suite {
    name: &'static str,
    source: Source,
    handler: &'static str,
}

const SUITES: [Suite; 8] = [
    Suite { name: "critest", source: Source::Critest, handler: "husk" },
    Suite { name: "critest-shim", source: Source::Critest, handler: "husk-shim" },
    Suite { name: "pods", source: Source::Pods, handler: "husk" },
    Suite { name: "pods-shim", source: Source::Pods, handler: "husk-shim" },
    Suite { name: "install", source: Source::Install, handler: "husk" },
    Suite { name: "install-shim", source: Source::Install, handler: "husk-shim" },
    Suite { name: "stress", source: Source::Stress, handler: "husk" },
    Suite { name: "stress-shim", source: Source::Stress, handler: "husk-shim" },
];

/// What one worker does at a time.
enum Job {
    Critest(&'static str),
    Pods(Vec<&'static str>),
    Install(Vec<&'static str>),
    Stress(Vec<&'static str>),
}

/// Results by source and runtime handler.
type Runs = HashMap<(Source, &'static str), Outcomes>;

/// The command line.
#[derive(Debug)]
struct Arguments {
    version: String,
    suites: Vec<Suite>,
    matching: String,
    jobs: usize,
    update: bool,
}

fn parse(words: &[String]) -> Result<Arguments> {
    // Stress takes too long for a run that does not ask for it.
    let suites = SUITES.into_iter().filter(|suite| suite.source != Source::Stress).collect();
    let mut only = Vec::new();
    let mut arguments = Arguments { version: NEWEST.into(), suites, matching: String::new(), jobs: 1, update: false };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--kubernetes" => arguments.version = value()?.clone(),
            "--only" => {
                let name = value()?;
                only.push(
                    SUITES
                        .into_iter()
                        .find(|suite| suite.name == name)
                        .with_context(|| format!("no suite named {name}"))?,
                );
            }
            "--match" => arguments.matching = value()?.clone(),
            "--jobs" => arguments.jobs = value()?.parse().context("--jobs needs a number")?,
            "--update" => arguments.update = true,
            _ => bail!(
                "unknown argument {word}; usage: kubernetes [--kubernetes VERSION] [--only SUITE]... [--match TEXT] \
                 [--jobs N] [--update]"
            ),
        }
    }
    if !only.is_empty() {
        arguments.suites = only;
    }
    ensure!(arguments.jobs > 0, "--jobs must not be 0");
    Ok(arguments)
}

/// Runs what the command line asks for.
pub fn main(words: &[String]) -> Result<ExitCode> {
    let arguments = parse(words)?;
    let needs = node::needs().into_iter().chain([critest::needs()]).chain(cluster::needs(&arguments.version));
    let installs = arguments.suites.iter().any(|suite| suite.source == Source::Install);
    let of_install = cluster::needs_without_husk(&arguments.version).into_iter().filter(|_| installs);
    for file in needs.chain(of_install) {
        ensure!(file.exists(), "{} is missing: run tests/setup-kubernetes {}", file.display(), arguments.version);
    }
    let metrics_server = cluster::metrics_server();
    ensure!(metrics_server.exists(), "{} is missing: run tests/setup-metrics-server", metrics_server.display());
    let expected = expected()?;
    let runs = run_all(jobs(&arguments.suites), &arguments)?;
    let (mut table, mut names) = (Table::default(), Vec::new());
    for suite in &arguments.suites {
        let name = |test: &str| Name { suite: suite.name.into(), test: test.into() };
        let [runc, husk] = [RUNC, suite.handler].map(|handler| runs.get(&(suite.source, handler)));
        let (runc, husk) = runc.zip(husk).context("a run without results")?;
        for test in runc.keys().chain(husk.keys()).collect::<BTreeSet<_>>() {
            table.add(suite.name, test, &results(runc, test), &results(husk, test));
            names.push(name(test));
        }
        if arguments.matching.is_empty() {
            // Rows of tests that are gone.
            names.extend(expected.table().0.keys().filter(|name| name.suite == suite.name).cloned());
        }
    }
    names.sort();
    names.dedup();
    ensure!(!names.is_empty(), "no test has {:?} in its name", arguments.matching);
    expected.conclude(&table, &names, arguments.update, |name| why(&runs, name))
}

/// What the run says of a test that does not pass under both runtimes.
fn why(runs: &Runs, name: &Name) -> Option<String> {
    let suite = SUITES.into_iter().find(|suite| suite.name == name.suite)?;
    let said = |handler| Some(runs.get(&(suite.source, handler))?.get(&name.test)?.why.clone());
    let both: BTreeSet<String> = [RUNC, suite.handler].into_iter().filter_map(said).collect();
    Some(both.into_iter().filter(|why| !why.is_empty()).collect::<Vec<_>>().join("; "))
}

fn results(outcomes: &Outcomes, test: &str) -> Results {
    outcomes.get(test).map(|outcome| (test.to_owned(), outcome.verdict)).into_iter().collect()
}

fn expected() -> Result<Expected> {
    Expected::read("tests/kubernetes/expected.tsv", HEADER, "./task test-kubernetes")
}

/// What each run printed: `critest-HANDLER/output`, and for pods `pods/SCRIPT.CLASS`, besides the daemons' logs.
fn logs() -> PathBuf {
    node::folder().join("output")
}

/// What there is to do for these suites. All pods run on one cluster, except under stress and where husk is
/// installed.
fn jobs(suites: &[Suite]) -> VecDeque<Job> {
    let handlers = |source| -> Vec<&'static str> {
        let of_source: Vec<_> =
            suites.iter().filter(|suite| suite.source == source).map(|suite| suite.handler).collect();
        if of_source.is_empty() { of_source } else { [vec![RUNC], of_source].concat() }
    };
    let classes = |source| Some(handlers(source)).filter(|classes| !classes.is_empty());
    let mut jobs: VecDeque<Job> = handlers(Source::Critest).into_iter().map(Job::Critest).collect();
    jobs.extend(classes(Source::Pods).map(Job::Pods));
    jobs.extend(classes(Source::Install).map(Job::Install));
    jobs.extend(classes(Source::Stress).map(Job::Stress));
    jobs
}

/// Runs the jobs, several at a time, each on a node of its own.
fn run_all(jobs: VecDeque<Job>, arguments: &Arguments) -> Result<Runs> {
    let (queue, runs) = (Mutex::new(jobs), Mutex::new(Runs::new()));
    let work = || -> Result<()> {
        loop {
            // A statement of its own: the lock must not last as long as the run.
            let next = lock(&queue).pop_front();
            let Some(job) = next else { return Ok(()) };
            let done = run_one(&job, arguments)?;
            lock(&runs).extend(done);
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..arguments.jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    Ok(runs.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn run_one(job: &Job, arguments: &Arguments) -> Result<Vec<((Source, &'static str), Outcomes)>> {
    let name = match job {
        Job::Critest(handler) => format!("critest-{handler}"),
        Job::Pods(_) => "pods".into(),
        Job::Install(_) => "install".into(),
        Job::Stress(_) => "stress".into(),
    };
    let folder = logs().join(&name);
    if folder.exists() {
        fs::remove_dir_all(&folder).context("remove the last run's output")?;
    }
    writeln!(std::io::stderr(), "kubernetes: {name}; output: {}", folder.display())?;
    let started = Instant::now();
    let (version, matching) = (&arguments.version, &arguments.matching);
    let (source, handlers, all) = match job {
        Job::Critest(handler) => (
            Source::Critest,
            std::slice::from_ref(handler),
            critest::run(handler, matching, &folder).map(|one| vec![one]),
        ),
        Job::Pods(classes) => (Source::Pods, &classes[..], pods::run(version, classes, matching, &folder)),
        Job::Install(classes) => (Source::Install, &classes[..], install::run(version, classes, &folder)),
        Job::Stress(classes) => (Source::Stress, &classes[..], stress::run(version, classes, matching, &folder)),
    };
    let all = all.context(name)?;
    let done: Vec<_> = handlers.iter().map(|handler| (source, *handler)).zip(all).collect();
    for ((source, handler), outcomes) in &done {
        let count = |wanted| outcomes.values().filter(|outcome| outcome.verdict == wanted).count();
        writeln!(
            std::io::stderr(),
            "kubernetes: {source:?} with {handler}: {} pass, {} fail, {} skip, {} other; {:.0?}",
            count(Verdict::Pass),
            count(Verdict::Fail),
            count(Verdict::Skip),
            count(Verdict::Timeout) + count(Verdict::Absent),
            started.elapsed()
        )?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_table_gives_a_reason_for_every_row_that_does_not_pass() {
        let expected = expected().unwrap();
        assert!(expected.table().0.len() > 200, "{} rows", expected.table().0.len());
        expected.check().unwrap();
    }
}
