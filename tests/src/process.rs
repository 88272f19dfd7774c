//! The machine's processes according to /proc: who descends from whom, and how to kill exactly those.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As the test's PID namespace shows it.
    pub pid: i32,
    /// Parent PID.
    pub parent: i32,
    /// Short name.
    pub name: String,
    /// Arguments, joined by spaces; empty for a zombie.
    pub command: String,
    /// Start time in clock ticks since boot: distinguishes a process from a later one with the same PID.
    pub started: u64,
    /// Whether it has exited without being reaped.
    pub zombie: bool,
}

impl Process {
    /// Reads `/proc/<pid>`; `None` if the process is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may contain some itself: proc_pid_stat(5).
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned();
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            name,
            command,
            started: fields.get(19)?.parse().ok()?,
            zombie: fields.first() == Some(&"Z"),
        })
    }

    /// A line of `/proc/<pid>/status` (proc_pid_status(5)): its words, separated by spaces.
    pub fn status(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {name}"))?.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// CPU time in clock ticks, with that of its children that it has waited for; 0 if it is gone.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
        // utime, stime, cutime and cstime: proc_pid_stat(5).
        fields.skip(11).take(4).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
    }

    /// Whether it is still the same process, and not a zombie.
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.started == self.started && !now.zombie)
    }

    /// Sends SIGKILL if it is still the same process.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends SIGQUIT if it is still the same process. A program in Go prints where its goroutines wait, and exits.
    pub fn quit(&self) {
        self.signal(Signal::SIGQUIT);
    }

    /// Sends SIGSTOP if it is still the same process.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Sends SIGCONT if it is still the same process.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if self.is_alive() {
            // The process may exit in between: the caller examines the outcome.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// All processes.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect()
}

/// All processes that `ancestor` has started, directly or indirectly, without itself.
pub fn descendants(ancestor: i32) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    for process in all() {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut pending = vec![ancestor];
    while let Some(pid) = pending.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            pending.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// Kills `ancestor` and its descendants. The descendants are listed first: an orphan would no longer be found.
pub fn kill_tree(ancestor: i32) {
    let below = descendants(ancestor);
    if let Some(process) = Process::read(ancestor) {
        process.kill();
    }
    below.iter().for_each(Process::kill);
}
