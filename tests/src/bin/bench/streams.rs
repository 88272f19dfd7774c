//! Standard streams of an exec: throughput, round trips and a terminal, with husk and with runc in turn. The benchmark
//! holds the client's ends of the fifos itself, so that no client adds its own work. One row shows `ctr` instead.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Version;
use husk_tests::containerd::{Containerd, Setup};
use husk_tests::shim::{Shim, Streams};
use husk_tests::{bundle, fifo};

use crate::ctr::{BOTH, ms};
use crate::report::{Column, Report, Target};

/// Bytes sent in one direction.
const BULK: usize = 64 << 20;
/// Bytes sent through a terminal.
const TERMINAL: usize = 8 << 20;
/// Bytes of a round trip that is mostly throughput.
const LARGE: usize = 4 << 20;
/// Bytes read or written at once.
const BLOCK: usize = 256 * 1024;

/// The targets under TCG, from the issue that introduced raw streams.
const STDOUT: f64 = 250.0;
const STDOUT_TIMES_RUNC: f64 = 0.5;
const STDIN: f64 = 120.0;
const ROUND_TRIP: f64 = 0.6;

/// A measurement: its name, its unit, its target, samples per four rounds, how to take one, and from what.
type Measured = (&'static str, &'static str, Target, usize, fn(&mut Process<'_>) -> Result<f64>, Kind);

/// The process that a measurement needs.
#[derive(Clone, Copy)]
enum Kind {
    Writes,
    Reads,
    Echoes,
    Terminal,
}

const MEASURED: [Measured; 6] = [
    ("stdout, 64 MiB", "MiB/s", Target::AtLeast(STDOUT), 1, |p| p.receive_bulk(), Kind::Writes),
    ("stdin, 64 MiB", "MiB/s", Target::AtLeast(STDIN), 1, |p| p.send_bulk(), Kind::Reads),
    ("round trip of 8 B", "ms", Target::AtMost(ROUND_TRIP), 40, |p| p.echo(8), Kind::Echoes),
    ("round trip of 4 KiB", "ms", Target::Any, 40, |p| p.echo(4096), Kind::Echoes),
    ("round trip of 4 MiB", "ms", Target::Any, 4, |p| p.echo(LARGE), Kind::Echoes),
    ("output of a terminal, 8 MiB", "MiB/s", Target::Any, 1, |p| p.receive_terminal(), Kind::Terminal),
];

/// Measures the streams of both runtimes.
pub(crate) fn run(rounds: usize, report: &mut Report) -> Result<()> {
    report.about("containerd", Version::default_for_tests().name());
    let mut containerds = Vec::new();
    for (column, runtime) in BOTH {
        containerds.push((column, Containerd::with(Setup { runtime: Some(runtime), ..Setup::default() })?));
    }
    let mut shims = Vec::new();
    for (column, containerd) in &containerds {
        shims.push((*column, Shim::idle(containerd, "streams")?));
    }
    for (number, (name, unit, target, per_round, take, kind)) in MEASURED.into_iter().enumerate() {
        let mut samples: Vec<(Column, Vec<f64>)> = shims.iter().map(|(column, _)| (*column, Vec::new())).collect();
        for round in 0..rounds.div_ceil(4) {
            for ((_, shim), (_, samples)) in shims.iter().zip(&mut samples) {
                samples.extend(sample(shim, &format!("m{number}-{round}"), kind, per_round, take)?);
            }
        }
        report.median(name, unit, &samples, target);
    }
    let mut values = Vec::new();
    for (column, containerd) in &containerds {
        values.push((*column, through_ctr(containerd, rounds.div_ceil(4))?));
    }
    report.row("stdout through ctr, 64 MiB, best", "MiB/s", &values, Target::AtLeastTimesRunc(STDOUT_TIMES_RUNC));
    Ok(())
}

/// Throughput of a `ctr task exec`, without what the command takes for a program that writes nothing. From the shortest
/// of `count` runs of each: the difference of two runs on a loaded machine can be anything.
fn through_ctr(containerd: &Containerd, count: usize) -> Result<f64> {
    let container = containerd.detached(&[], "ctr", &["sleep", "100000"])?;
    let zeros = ["dd", "if=/dev/zero", "bs=1M", &format!("count={}", BULK >> 20)];
    let (mut idle, mut written) = (Duration::MAX, Duration::MAX);
    for _ in 0..count {
        idle = idle.min(container.exec(&["true"]).ok()?.took);
        let ran = container.exec(&zeros).ok()?;
        ensure!(ran.stdout.len() == BULK, "received {} of {BULK} bytes", ran.stdout.len());
        written = written.min(ran.took);
    }
    let took = written.checked_sub(idle).filter(|took| !took.is_zero());
    let took =
        took.with_context(|| format!("64 MiB took {written:?}, no output {idle:?}: repeat on an idle machine"))?;
    Ok((BULK >> 20) as f64 / took.as_secs_f64())
}

fn sample(
    shim: &Shim<'_>,
    exec: &str,
    kind: Kind,
    count: usize,
    take: fn(&mut Process<'_>) -> Result<f64>,
) -> Result<Vec<f64>> {
    let mut process = Process::start(shim, exec, kind)?;
    let samples = (0..count).map(|_| take(&mut process)).collect::<Result<_>>();
    process.end()?;
    samples
}

/// A process with the client's ends of its streams.
struct Process<'a> {
    shim: &'a Shim<'a>,
    exec: String,
    stdin: File,
    stdout: File,
    /// Keep the fifos' reading ends open.
    _readers: Vec<fifo::Reader>,
    block: Vec<u8>,
}

impl<'a> Process<'a> {
    fn start(shim: &'a Shim<'a>, exec: &str, kind: Kind) -> Result<Self> {
        let zeros = |bytes: usize| format!("dd if=/dev/zero bs=256k count={} 2>/dev/null", bytes / BLOCK);
        let script = match kind {
            Kind::Writes => format!("read go; {}", zeros(BULK)),
            Kind::Reads => {
                let count = BULK / BLOCK;
                format!("echo ready; dd of=/dev/null bs=256k count={count} iflag=fullblock 2>/dev/null; echo done")
            }
            Kind::Echoes => "exec cat".to_owned(),
            Kind::Terminal => format!("stty raw -echo; echo ready; read go; {}", zeros(TERMINAL)),
        };
        let mut process = bundle::process(&["sh", "-c", &script]);
        let terminal = matches!(kind, Kind::Terminal);
        process["terminal"] = terminal.into();
        let (io, stdin, readers) = if terminal {
            let (io, stdin, reader) = shim.terminal(exec)?;
            (io, stdin, vec![reader])
        } else {
            let (io, stdout, stderr) = shim.streams(exec)?;
            let name = format!("{exec}.in");
            let stdin = fifo::writer(&shim.bundle.outside.join(&name))?;
            let io = Streams { stdin: shim.bundle.path.join(&name).display().to_string(), ..io };
            (io, stdin, vec![stdout, stderr])
        };
        shim.start_exec(exec, &process, &io)?;
        let output = if terminal { "output" } else { "out" };
        // Does not block: the shim has opened the other end.
        let stdout = File::open(shim.bundle.outside.join(format!("{exec}.{output}"))).context("open a fifo")?;
        let mut process = Self { shim, exec: exec.to_owned(), stdin, stdout, _readers: readers, block: vec![0; BLOCK] };
        if matches!(kind, Kind::Reads | Kind::Terminal) {
            process.expect_line("ready")?;
        }
        Ok(process)
    }

    fn expect_line(&mut self, expected: &str) -> Result<()> {
        let mut line = String::new();
        while !line.ends_with('\n') {
            let mut byte = [0];
            self.stdout.read_exact(&mut byte)?;
            line.push(byte[0].into());
        }
        ensure!(line.trim_end() == expected, "{line:?} instead of {expected:?}");
        Ok(())
    }

    fn receive(&mut self, bytes: usize) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            let most = left.min(BLOCK);
            let read = self.stdout.read(&mut self.block[..most])?;
            ensure!(read > 0, "the output ended {left} bytes early");
            left -= read;
        }
        Ok(())
    }

    fn receive_at_rate(&mut self, bytes: usize) -> Result<f64> {
        self.stdin.write_all(b"go\n")?;
        self.receive(1)?;
        let started = Instant::now();
        self.receive(bytes - 1)?;
        Ok(rate(bytes, started))
    }

    fn receive_bulk(&mut self) -> Result<f64> {
        self.receive_at_rate(BULK)
    }

    fn receive_terminal(&mut self) -> Result<f64> {
        self.receive_at_rate(TERMINAL)
    }

    fn send_bulk(&mut self) -> Result<f64> {
        let started = Instant::now();
        for _ in 0..BULK / BLOCK {
            self.stdin.write_all(&self.block)?;
        }
        self.expect_line("done")?;
        Ok(rate(BULK, started))
    }

    fn echo(&mut self, bytes: usize) -> Result<f64> {
        let started = Instant::now();
        let mut stdin = self.stdin.try_clone()?;
        if bytes <= 4096 {
            stdin.write_all(&self.block[..bytes])?;
            self.receive(bytes)?;
            return Ok(ms(started.elapsed()));
        }
        std::thread::scope(|scope| {
            // More than the buffers on the way hold.
            let sender = scope.spawn(move || stdin.write_all(&vec![0; bytes]));
            self.receive(bytes)?;
            sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("write to a fifo")
        })?;
        Ok(ms(started.elapsed()))
    }

    /// Ends the process and removes its fifos.
    fn end(self) -> Result<()> {
        let (shim, id, exec) = (self.shim, &self.shim.bundle.id, &self.exec);
        drop(self.stdin);
        shim.task.close_stdin(id, exec)?;
        shim.task.wait(id, exec)?;
        shim.task.delete(id, exec)?;
        for stream in ["in", "out", "err", "input", "output"] {
            // Exists for some processes only.
            let _ = fs::remove_file(shim.bundle.outside.join(format!("{exec}.{stream}")));
        }
        Ok(())
    }
}

fn rate(bytes: usize, started: Instant) -> f64 {
    (bytes >> 20) as f64 / started.elapsed().as_secs_f64()
}
