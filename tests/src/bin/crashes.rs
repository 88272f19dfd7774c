//! PostgreSQL on a volume whose VM is killed, again and again: `crashes [--rounds N] [--seed N]`.
//!
//! In each round, a container starts PostgreSQL with its data on the same volume, and checks that everything that it has
//! ever confirmed is there. Then three clients insert rows, and print each number when PostgreSQL has confirmed it. Up to
//! two seconds later, SIGKILL ends QEMU, or the shim in every other round; in every tenth round already during
//! PostgreSQL's start. After the last round, PostgreSQL's checksums and the filesystem are checked.
#![cfg_attr(target_env = "musl", allow(unused))]

#[cfg(not(target_env = "musl"))]
fn main() -> std::process::ExitCode {
    use std::process::ExitCode;

    let done = run::Arguments::parse(std::env::args().skip(1)).and_then(run::run);
    done.map_or_else(
        |error| {
            eprintln!("crashes: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// Cargo builds all programs of the crate when it builds one for the guest. This program does not run there.
#[cfg(target_env = "musl")]
fn main() {}

#[cfg(not(target_env = "musl"))]
mod run {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::thread;
    use std::time::{Duration, Instant};

    use anyhow::{Context, Result, bail, ensure};
    use husk_tests::command::{self, wait_for};
    use husk_tests::debian::Debian;
    use husk_tests::process::Process;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use serde_json::json;

    const ROUNDS: usize = 200;
    const VOLUME_MIB: u64 = 512;
    /// Deadline for PostgreSQL's start, with its recovery, in a VM without hardware virtualization on a loaded machine.
    const START: Duration = Duration::from_secs(900);
    /// Deadline for the end of a killed VM.
    const END: Duration = Duration::from_secs(60);
    /// Longest time from the first confirmation, or from the container's start, to the kill.
    const LATEST: Duration = Duration::from_secs(2);

    /// Starts PostgreSQL, which recovers what it finds, and prints `have CLIENT LAST COUNT` for each client. The file of its
    /// process ID names one of another VM.
    const PREPARE: &str = r#"set -e
        cd /; data=/pg/data
        as() { setpriv --reuid=100 --regid=100 --clear-groups "$@"; }
        if ! [ -e /pg/initialized ]; then
            rm -rf $data; mkdir $data; chown 100:100 $data
            as initdb --data-checksums --auth=trust --no-instructions -D $data >/pg/initdb.log
            sync; touch /pg/initialized; sync
        fi
        rm -f $data/postmaster.pid
        echo starting
        as pg_ctl -D $data -s -w -t 800 -l /pg/data/server.log -o "-c listen_addresses= -c unix_socket_directories=/tmp" start
        sql() { as psql -h /tmp -U postgres -qAtX -v ON_ERROR_STOP=1 "$@"; }
        sql -c 'set client_min_messages = warning' \
            -c 'create table if not exists log (client int, n int, filler text, primary key (client, n))'
        sql -F ' ' -c "select 'have', client, max(n), count(*) from log group by client"
        echo started
    "#;
    /// Each client continues with the number after its last one.
    const INSERT: &str = r#"
        for client in 1 2 3; do
            first=$(sql -c "select coalesce(max(n), 0) + 1 from log where client = $client")
            while echo "insert into log values ($client, $first, repeat('x', 500)) returning 'done ' || client || ' ' || n;"; do
                first=$((first + 1))
            done | sql &
        done
        wait
    "#;
    /// Ends PostgreSQL in order and checks every page.
    const CHECK: &str = r#"
        as pg_ctl -D $data -s -w -m fast stop
        as pg_checksums --check -D $data | grep 'Bad checksums'
        echo checked
    "#;

    /// The command line.
    pub(super) struct Arguments {
        rounds: usize,
        seed: u64,
    }

    impl Arguments {
        /// Reads the words after the program's name.
        pub(super) fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
            // Different in each run, and printed.
            let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
            let mut arguments = Self { rounds: ROUNDS, seed };
            while let Some(word) = words.next() {
                let value = words.next().with_context(|| format!("{word} needs a value"))?;
                match word.as_str() {
                    "--rounds" => arguments.rounds = value.parse().context("--rounds")?,
                    "--seed" => arguments.seed = value.parse().context("--seed")?,
                    _ => bail!("unknown argument {word:?}; the options are --rounds N and --seed N"),
                }
            }
            Ok(arguments)
        }
    }

    /// Times of the kills: a linear congruential generator, because nothing depends on their quality.
    struct Delays(u64);

    impl Delays {
        fn next(&mut self) -> Duration {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            LATEST.mul_f64((self.0 >> 11) as f64 / (1_u64 << 53) as f64)
        }
    }

    /// What PostgreSQL has confirmed: the last number of each client, and how many rows.
    #[derive(Default)]
    struct Confirmed {
        last: BTreeMap<u32, u64>,
        count: u64,
    }

    impl Confirmed {
        /// Reads a line `done CLIENT NUMBER`. Ignores others.
        fn read(&mut self, line: &str) -> Result<()> {
            if let ["done", client, n] = line.split(' ').collect::<Vec<_>>()[..] {
                let last = self.last.entry(client.parse()?).or_default();
                *last = (*last).max(n.parse()?);
                self.count += 1;
            }
            Ok(())
        }

        /// Fails unless everything that was confirmed is there, and nothing between is missing.
        fn compare(&self, found: &BTreeMap<u32, (u64, u64)>) -> Result<()> {
            for (client, last) in &self.last {
                let (max, count) = found.get(client).copied().unwrap_or_default();
                ensure!(
                    max >= *last && count == max,
                    "client {client}: {last} was confirmed; PostgreSQL has {count} rows up to {max}"
                );
            }
            Ok(())
        }
    }

    /// What a round kills, and when.
    #[derive(Clone, Copy)]
    struct Plan {
        shim: bool,
        during_start: bool,
        after: Duration,
    }

    pub(super) fn run(Arguments { rounds, seed }: Arguments) -> Result<()> {
        let debian = Debian::start()?;
        let (mut delays, mut confirmed) = (Delays(seed), Confirmed::default());
        let mut out = std::io::stdout();
        writeln!(out, "{rounds} rounds, seed {seed}")?;
        for round in 0..rounds {
            let plan = Plan { shim: round % 2 == 1, during_start: round > 0 && round % 10 >= 8, after: delays.next() };
            let began = Instant::now();
            let before = confirmed.count;
            let killed = crash(&debian, plan, &mut confirmed);
            killed.with_context(|| format!("round {round}, seed {seed}: {}", debian.containerd.log_tail()))?;
            let (what, when) =
                (if plan.shim { "shim" } else { "QEMU" }, if plan.during_start { "start" } else { "work" });
            let new = confirmed.count - before;
            writeln!(out, "round {round}: {what} killed during {when}, {new} confirmed, {:.1?}", began.elapsed())?;
        }
        let id = debian.containerd.id("check");
        let mut postgres = Postgres::start(&debian, &id, CHECK)?;
        confirmed.compare(&postgres.started()?)?;
        let mut bad = None;
        while let Some(line) = postgres.line(START)? {
            bad = line.strip_prefix("Bad checksums:").map(|count| count.trim().to_owned()).or(bad);
            if line == "checked" {
                break;
            }
        }
        ensure!(bad.as_deref() == Some("0"), "PostgreSQL's checksums: {bad:?} are bad");
        postgres.await_exit()?;
        drop(postgres);
        let mut fsck = Command::new("e2fsck");
        fsck.args(["-f", "-n"]).arg(debian.folder().join("pg.img"));
        command::run(fsck, None, END)?.ok().context("the volume's filesystem")?;
        let count = confirmed.count;
        writeln!(
            out,
            "{rounds} rounds: none of {count} confirmed transactions is lost; checksums and filesystem are good"
        )?;
        Ok(())
    }

    /// One round.
    fn crash(debian: &Debian, plan: Plan, confirmed: &mut Confirmed) -> Result<()> {
        let containerd = &debian.containerd;
        let id = containerd.id("pg");
        let postgres = Postgres::start(debian, &id, INSERT)?;
        if plan.during_start {
            postgres.starting()?;
        } else {
            confirmed.compare(&postgres.started()?)?;
            let line = postgres.line(START)?.context("PostgreSQL has confirmed nothing")?;
            confirmed.read(&line)?;
        }
        // Not earlier: the program that has started the shim has its name.
        let (shim, qemu) = (containerd.shim_of(&id)?.0, containerd.qemu_of(&id)?);
        postgres.follow(plan.after, confirmed)?;
        let victim = if plan.shim { &shim } else { &qemu };
        kill(Pid::from_raw(victim.pid), Signal::SIGKILL).context("the VM has ended early")?;
        // What was printed before the kill counts too.
        while let Some(line) = postgres.line(END)? {
            confirmed.read(&line)?;
        }
        wait_for(END, "the VM is gone", || {
            Process::read(qemu.pid)
                .is_none_or(|process| process.zombie || process.started != qemu.started)
                .then_some(())
        })
    }

    /// A container with PostgreSQL: `ctr run`, and its lines.
    struct Postgres<'a> {
        debian: &'a Debian,
        id: String,
        ctr: Child,
        lines: Receiver<String>,
    }

    impl<'a> Postgres<'a> {
        fn start(debian: &'a Debian, id: &str, then: &str) -> Result<Self> {
            let volume =
                json!([{"source": debian.folder().join("pg.img"), "destination": "/pg", "size_mib": VOLUME_MIB}]);
            let volume = format!("io.husk.volumes={volume}");
            let flags = ["--runtime", "io.containerd.husk.v1", "--annotation", &volume];
            let mut command = debian.run(&flags, id, &format!("{PREPARE}{then}")).command();
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
            let mut ctr = command.spawn().context("start ctr")?;
            let stdout = ctr.stdout.take().context("ctr has no stdout")?;
            let (sender, lines) = channel();
            thread::spawn(move || {
                // A line that a kill has cut off is not a confirmation: it does not end.
                let mut reader = BufReader::new(stdout);
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|length| length > 0) && line.ends_with('\n') {
                    if sender.send(line.trim_end().to_owned()).is_err() {
                        break;
                    }
                    line.clear();
                }
            });
            Ok(Self { debian, id: id.to_owned(), ctr, lines })
        }

        /// The next line; None at the end.
        fn line(&self, within: Duration) -> Result<Option<String>> {
            match self.lines.recv_timeout(within) {
                Ok(line) => Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => Ok(None),
                Err(RecvTimeoutError::Timeout) => bail!("no output of the container within {within:?}"),
            }
        }

        /// Waits until PostgreSQL is about to start.
        fn starting(&self) -> Result<()> {
            while let Some(line) = self.line(START)? {
                if line == "starting" {
                    return Ok(());
                }
            }
            bail!("the container has ended early: {}", self.debian.containerd.log_tail())
        }

        /// Waits until PostgreSQL runs. Returns each client's last number and its count of rows.
        fn started(&self) -> Result<BTreeMap<u32, (u64, u64)>> {
            let mut found = BTreeMap::new();
            while let Some(line) = self.line(START)? {
                match line.split(' ').collect::<Vec<_>>()[..] {
                    ["have", client, last, count] => {
                        found.insert(client.parse()?, (last.parse()?, count.parse()?));
                    }
                    ["started"] => return Ok(found),
                    _ => {}
                }
            }
            bail!("PostgreSQL has not started: {}", self.debian.containerd.log_tail())
        }

        /// Counts what is confirmed for so long.
        fn follow(&self, time: Duration, confirmed: &mut Confirmed) -> Result<()> {
            let end = Instant::now() + time;
            loop {
                match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(line) => confirmed.read(&line)?,
                    Err(RecvTimeoutError::Timeout) => return Ok(()),
                    Err(RecvTimeoutError::Disconnected) => {
                        bail!("the container has ended early: {}", self.debian.containerd.log_tail())
                    }
                }
            }
        }

        fn await_exit(&mut self) -> Result<()> {
            let status = self.ctr.wait()?;
            ensure!(status.success(), "the container has ended with {status}");
            Ok(())
        }
    }

    impl Drop for Postgres<'_> {
        fn drop(&mut self) {
            let containerd = &self.debian.containerd;
            drop(containerd.adopt(&self.id));
            // It has ended if its container has.
            let _ = self.ctr.kill();
            let _ = self.ctr.wait();
        }
    }
}
