//! The machine's processes as /proc tells them: who descends from whom, and how to end exactly those.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As this process (the test) sees it.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Its short name.
    pub name: String,
    /// Arguments, joined by blanks; empty for a zombie.
    pub command: String,
    /// Clock ticks since boot: tells a process from a later one with the same pid.
    pub started: u64,
    /// It has ended and waits for its parent to notice.
    pub zombie: bool,
}

impl Process {
    /// Reads `/proc/<pid>`; nothing if the process is gone.
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in parentheses and may contain some itself: proc_pid_stat(5).
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

    /// Still the same process, and not only a zombie of it.
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.started == self.started && !now.zombie)
    }

    /// Sends SIGKILL if it is still the same process.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends SIGSTOP if it is still the same process: it is there, and does nothing any more.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Has it go on after [`Process::stop`].
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if self.is_alive() {
            // A process that ended in between is no error: the caller looks at what became of it.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// All processes.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect()
}

/// Everything that `ancestor` has started, directly or not, without itself.
pub fn descendants(ancestor: i32) -> Vec<Process> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    for process in all() {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut open = vec![ancestor];
    while let Some(pid) = open.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            open.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// Ends `ancestor` and all that it has started, deepest last so that nobody is reparented before it is found.
pub fn kill_tree(ancestor: i32) {
    let below = descendants(ancestor);
    if let Some(process) = Process::read(ancestor) {
        process.kill();
    }
    below.iter().for_each(Process::kill);
}
