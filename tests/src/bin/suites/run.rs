//! Runs the suites' tests, several at a time, and compares the results with the checked-in table.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use husk_protos::lock::lock;
use husk_tests::artifacts::Runtime;
use husk_tests::expected::Expected;
use husk_tests::table::{Name, Results, Table, Verdict};
use nix::fcntl::{Flock, FlockArg};

use crate::place::{Place, suites};
use crate::{adapter, client, validation};

/// First lines of the table.
const HEADER: &str = "\
# What public test suites say of runc's shim and of husk. `./task test-suites` compares a run with this table;
# `./task test-suites -- --update` writes it. Each program or test has a row; a part of one has a row if it does not pass
# under both. Every row that is not `pass pass` says why, in the last column. `varies: ` there means that the result depends
# on the machine's speed: such a test is run, but not compared.
# suite\ttest\trunc\thusk\treason
";
/// Cgroups that tests name without regard for others. They stay behind if a test fails.
const CGROUPS: [&str; 3] = ["testing", "suites", "TestDaemonCustomCgroup"];
/// The same, of several tests: see [`Suite::shares_cgroups`].
const SHARED_CGROUPS: [&str; 2] = ["cgrouptest", "testdir"];

/// One suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suite {
    Client,
    Validation,
}

impl Suite {
    const ALL: [Self; 2] = [Self::Client, Self::Validation];

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Validation => "validation",
        }
    }

    fn needs(self) -> [PathBuf; 2] {
        match self {
            Self::Client => client::needs(),
            Self::Validation => validation::needs(),
        }
    }

    /// Whether the test uses cgroups whose names others use too, and must not run beside those.
    fn shares_cgroups(self, test: &str) -> bool {
        self == Self::Validation && (test.starts_with("linux_cgroups_") || test == "delete_resources")
    }

    fn list(self) -> Result<Vec<String>> {
        match self {
            Self::Client => client::list(),
            Self::Validation => validation::list(),
        }
    }

    fn run(self, place: &Place, test: &str) -> Result<(Results, String)> {
        match self {
            Self::Client => client::run(place, test),
            Self::Validation => validation::run(place, test),
        }
    }
}

/// The command line.
#[derive(Debug)]
struct Arguments {
    suites: Vec<Suite>,
    matching: String,
    except: Option<String>,
    jobs: usize,
    update: bool,
}

fn parse(words: &[String]) -> Result<Arguments> {
    let jobs = thread::available_parallelism().map_or(1, usize::from).min(4);
    let mut arguments =
        Arguments { suites: Suite::ALL.into(), matching: String::new(), except: None, jobs, update: false };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--only" => {
                let name = value()?;
                let suite = Suite::ALL.into_iter().find(|suite| suite.name() == name);
                arguments.suites = vec![suite.with_context(|| format!("no suite named {name}"))?];
            }
            "--match" => arguments.matching = value()?.clone(),
            "--except" => arguments.except = Some(value()?.clone()),
            "--jobs" => arguments.jobs = value()?.parse().context("--jobs needs a number")?,
            "--update" => arguments.update = true,
            _ => bail!(
                "unknown argument {word}; \
                 usage: suites [--only SUITE] [--match TEXT] [--except TEXT] [--jobs N] [--update]"
            ),
        }
    }
    ensure!(arguments.jobs > 0, "--jobs must not be 0");
    Ok(arguments)
}

/// Runs what the command line asks for.
pub fn main(words: &[String]) -> Result<ExitCode> {
    let arguments = parse(words)?;
    for file in arguments.suites.iter().flat_map(|suite| suite.needs()) {
        ensure!(file.exists(), "{} is missing: run tests/setup-suites", file.display());
    }
    // Tests of containerd's client name their cgroups after themselves: two runs at once would share them.
    let _alone = alone()?;
    let mut cases = VecDeque::new();
    for suite in &arguments.suites {
        let excepted = |test: &str| arguments.except.as_ref().is_some_and(|text| test.contains(text));
        let tests = suite.list()?.into_iter().filter(|test| test.contains(&arguments.matching) && !excepted(test));
        cases.extend(tests.map(|test| (*suite, test)));
    }
    ensure!(!cases.is_empty(), "no test has {:?} in its name", arguments.matching);
    let names: Vec<Name> = cases.iter().map(|(suite, test)| name(*suite, test)).collect();
    let started = Instant::now();
    let outcome = run_all(cases, arguments.jobs);
    remove_cgroups(&CGROUPS);
    let run = outcome?;
    let mut out = std::io::stdout();
    writeln!(out, "{:.0?}. Output of every test: {}", started.elapsed(), logs().display())?;
    expected()?.conclude(&run, &names, arguments.update, |_| None)
}

fn name(suite: Suite, test: &str) -> Name {
    Name { suite: suite.name().into(), test: test.into() }
}

/// A lock that leaves nothing behind: on a directory that every machine has.
fn alone() -> Result<Flock<File>> {
    let folder = File::open("/sys/fs/cgroup").context("open /sys/fs/cgroup")?;
    match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((folder, nix::errno::Errno::EWOULDBLOCK)) => {
            writeln!(std::io::stderr(), "suites: waiting for another run on this machine")?;
            Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, e)| e).context("wait for the other run")
        }
        Err((_, error)) => Err(error).context("lock /sys/fs/cgroup"),
    }
}

/// Runs all tests under both runtimes and returns their rows.
fn run_all(cases: VecDeque<(Suite, String)>, jobs: usize) -> Result<Table> {
    let total = cases.len();
    let (queue, table) = (Mutex::new(cases), Mutex::new((Table::default(), 0)));
    let shared_cgroups = Mutex::new(());
    if logs().exists() {
        fs::remove_dir_all(logs()).context("remove the last run's output")?;
    }
    let work = || -> Result<()> {
        let mut places: [(Runtime, Option<Place>); 2] = [(Runtime::Runc, None), (Runtime::Husk, None)];
        loop {
            // A statement of its own: the lock must not last as long as the test.
            let next = lock(&queue).pop_front();
            let Some((suite, test)) = next else { return Ok(()) };
            let mut both = Vec::new();
            let alone = suite.shares_cgroups(&test).then(|| lock(&shared_cgroups));
            for (runtime, place) in &mut places {
                both.push(run_one(suite, &test, *runtime, place)?);
                if alone.is_some() {
                    remove_cgroups(&SHARED_CGROUPS);
                }
            }
            drop(alone);
            let verdict = |results: &Results| results.get(&test).copied().unwrap_or(Verdict::Absent);
            let mut shared = lock(&table);
            shared.0.add(suite.name(), &test, &both[0].0, &both[1].0);
            shared.1 += 1;
            writeln!(
                std::io::stderr(),
                "suites: {}/{total} {} {test}: runc {} {:.1} s, husk {} {:.1} s",
                shared.1,
                suite.name(),
                verdict(&both[0].0),
                both[0].1,
                verdict(&both[1].0),
                both[1].1,
            )?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    Ok(table.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).0)
}

/// Runs one test under one runtime. Returns its results and how many seconds it took. A place that it leaves unclean is
/// not used again.
fn run_one(suite: Suite, test: &str, runtime: Runtime, kept: &mut Option<Place>) -> Result<(Results, f32)> {
    let place = match kept.take() {
        Some(place) => place,
        None => {
            let place = Place::new(runtime).with_context(|| format!("make a place for {runtime:?}"))?;
            client::prepare(&place)?;
            place
        }
    };
    let started = Instant::now();
    let (results, output) = suite.run(&place, test)?;
    let logs_of_shims = adapter::take_logs(&place)?;
    let took = started.elapsed().as_secs_f32();
    let folder = logs().join(suite.name()).join(format!("{runtime:?}").to_lowercase());
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    fs::write(folder.join(test), format!("{output}\n--- left running ---\n{}\n{logs_of_shims}", place.left_running()))?;
    if place.is_clean() && results.get(test).is_some_and(|verdict| *verdict <= Verdict::Skip) {
        *kept = Some(place);
    }
    Ok((results, took))
}

/// The checked-in table.
fn expected() -> Result<Expected> {
    Expected::read("tests/suites/expected.tsv", HEADER, "./task test-suites")
}

/// What each test printed in the last run: `SUITE/RUNTIME/TEST`.
fn logs() -> PathBuf {
    suites().join("output")
}

/// Removes the cgroups that tests have left behind.
fn remove_cgroups(names: &[&str]) {
    let Ok(hierarchies) = fs::read_dir("/sys/fs/cgroup") else { return };
    let mut roots: Vec<PathBuf> = hierarchies.flatten().map(|entry| entry.path()).collect();
    roots.push("/sys/fs/cgroup".into());
    for root in roots {
        names.iter().for_each(|name| remove_empty(&root.join(name)));
    }
}

fn remove_empty(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    entries.flatten().filter(|entry| entry.path().is_dir()).for_each(|entry| remove_empty(&entry.path()));
    // One that is in use is not ours to remove.
    let _ = fs::remove_dir(folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_table_gives_a_reason_for_every_row_that_does_not_pass() {
        let expected = expected().unwrap();
        assert!(expected.table().0.len() > 150, "{} rows", expected.table().0.len());
        expected.check().unwrap();
    }
}
