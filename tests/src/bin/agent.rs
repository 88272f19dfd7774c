//! A supervisor agent for tests. The file `/etc/agent` selects its behaviour: `crash`, `serve`, `ignore-term` or
//! `flood`.
//!
//! Except with `crash`, the agent listens on TCP port 7007 of the loopback. A connection carries one request line,
//! `about`, `show PATH` or `run PATH ARGUMENT…`, and the response.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("hello") => {
            return match writeln!(io::stdout(), "hello") {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Some("child") => loop {
            std::thread::park();
        },
        _ => {}
    }
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<ExitCode> {
    writeln!(io::stdout(), "started pid={} at_ms={}", std::process::id(), boottime_ms())?;
    let behaviour = fs::read_to_string("/etc/agent")?;
    match behaviour.trim() {
        "crash" => return Ok(ExitCode::from(3)),
        "ignore-term" => {
            // SAFETY: no handler is installed. The signal is ignored, and children inherit that.
            unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
            let child = Command::new("/proc/self/exe").arg("child").spawn()?;
            writeln!(io::stdout(), "child={}", child.id())?;
        }
        "flood" => {
            // 2.5 MiB and a little more.
            let mut out = io::stdout().lock();
            for number in 0..40_000 {
                writeln!(out, "{number:07} {}", "x".repeat(57))?;
            }
        }
        _ => {}
    }
    let listener = TcpListener::bind("127.0.0.1:7007")?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        let response = match respond(line.trim()) {
            Ok(response) => response,
            Err(error) => format!("{line}: {error}"),
        };
        // The client may be gone.
        let _ = stream.write_all(response.as_bytes());
    }
    Ok(ExitCode::SUCCESS)
}

fn respond(line: &str) -> io::Result<String> {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("show", path) => {
            let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
            let content = fs::read(path)?;
            Ok(format!("{mode:o} {} {}\n", content.len(), checksum(&content)))
        }
        ("run", command) => {
            let mut words = command.split_whitespace();
            let output = Command::new(words.next().unwrap_or_default()).args(words).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        _ => about(),
    }
}

/// What the agent inherited from its parent, one item per line.
fn about() -> io::Result<String> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let status = read("/proc/self/status")?;
    let status_field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, into a variable that outlives the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: getsid takes an integer and touches no memory.
    let session = unsafe { libc::getsid(0) };
    // 0, 1, 2, the listener, the connection, and the directory that is being read.
    let fds = fs::read_dir("/proc/self/fd")?.count();
    let lines = [
        format!("pid={}", std::process::id()),
        format!("pid_file={}", read("/run/husk-supervisor.pid")?),
        format!("cgroup={}", read("/proc/self/cgroup")?),
        format!("memory_min={}", read("/sys/fs/cgroup/supervisor/memory.min")?),
        format!("oom_score_adj={}", read("/proc/self/oom_score_adj")?),
        format!("personality={}", read("/proc/self/personality")?),
        format!("blocked={} ignored={}", status_field("SigBlk:"), status_field("SigIgn:")),
        format!("open_files={}", limit.rlim_cur),
        format!("session={session}"),
        format!("fds={fds}"),
        format!("args={:?}", std::env::args().collect::<Vec<_>>()),
        format!("env={:?}", std::env::vars().collect::<Vec<_>>()),
        format!("stdin={}", fs::read_link("/proc/self/fd/0")?.display()),
    ];
    Ok(lines.join("\n") + "\n")
}

/// FNV-1a, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn boottime_ms() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec, into a variable that outlives the call. Every guest kernel has this
    // clock.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}
