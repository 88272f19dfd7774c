//! Whether a process serves its requests, as `/proc` shows it: without its cooperation, and without touching the files
//! that it may wait for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use procfs::process::{MountInfo, Process};

use crate::host::process::ProcessId;

/// How long a thread may wait in one system call, where slow disks answer sooner, and how much CPU time it may use without
/// ever waiting.
const PATIENCE: Duration = Duration::from_secs(10);
/// A thread that does useful work spends at least this part of its CPU time in the kernel: it serves files.
const WORK: u32 = 20;
/// Most threads that are looked at.
const THREADS: usize = 256;
/// The system calls in which a thread waits for something to do, or for another thread.
const IDLE: [i64; 17] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_futex,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
];

/// A thread at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Thread {
    id: i32,
    /// The first letter of its state (proc_pid_status(5)).
    state: char,
    /// How often it has gone to sleep.
    sleeps: u64,
    /// The system call that it is in, and its first argument. `None` if that is not known.
    call: Option<(i64, u64)>,
    /// Its CPU time.
    cpu: CpuTime,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuTime {
    user: Duration,
    kernel: Duration,
}

impl Thread {
    /// Whether it waits for something that is not work.
    fn waits(&self) -> bool {
        match self.state {
            'D' => true,
            'S' => self.call.is_some_and(|(number, _)| !IDLE.contains(&number)),
            _ => false,
        }
    }
}

/// Why a process serves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Block {
    /// By a signal or a debugger.
    Stopped,
    /// A thread has not left a system call for this long.
    Waits { thread: Thread, time: Duration },
    /// A thread has computed for this long and has done nothing.
    Spins { thread: Thread, time: Duration },
}

/// Why a process serves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// The reason, for people.
    pub(crate) text: String,
    /// It is in an endless loop, which it never leaves.
    pub(crate) endless: bool,
}

/// What was seen of a process's threads.
#[derive(Debug)]
pub(crate) struct Observer {
    /// The threads that wait: how often they had slept before, and since when they have been seen in this sleep.
    waiting: BTreeMap<i32, (u64, Instant)>,
    /// The threads that compute: how often they had slept before, and their CPU time when that was first seen.
    computing: BTreeMap<i32, (u64, CpuTime)>,
    patience: Duration,
}

impl Default for Observer {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), computing: BTreeMap::new(), patience: PATIENCE }
    }
}

impl Observer {
    /// Looks at the process, and returns why it serves nothing if that is so. A process that waits is found at the second
    /// look, if at least ten seconds have passed since the first; one that computes, after ten seconds of CPU time.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(crate) fn look(&mut self, process: ProcessId) -> io::Result<Option<Trouble>> {
        let threads = threads(process)?;
        let trouble =
            |block| Trouble { text: describe(process, &block), endless: matches!(block, Block::Spins { .. }) };
        Ok(self.judge(threads, Instant::now()).map(trouble))
    }

    /// Pure, but for its memory of what waits.
    fn judge(&mut self, threads: Vec<Thread>, now: Instant) -> Option<Block> {
        if threads.iter().any(|thread| matches!(thread.state, 'T' | 't')) {
            return Some(Block::Stopped);
        }
        if let Some(spins) = self.spins(&threads) {
            return Some(spins);
        }
        let before = std::mem::take(&mut self.waiting);
        for thread in threads.iter().filter(|thread| thread.waits()) {
            let since = before.get(&thread.id).filter(|(sleeps, _)| *sleeps == thread.sleeps).map(|(_, since)| *since);
            self.waiting.insert(thread.id, (thread.sleeps, since.unwrap_or(now)));
        }
        let waited = |thread: &Thread| self.waiting.get(&thread.id).map(|(_, since)| now.duration_since(*since));
        let longest =
            threads.into_iter().filter_map(|thread| Some((waited(&thread)?, thread))).max_by_key(|(time, _)| *time);
        longest.filter(|(time, _)| *time >= self.patience).map(|(time, thread)| Block::Waits { thread, time })
    }

    /// A thread that runs whenever it is looked at, has not waited in between, and has left nearly everything to itself: who
    /// serves files calls the kernel. The CPU time counts, and not the time: the host may be busy.
    fn spins(&mut self, threads: &[Thread]) -> Option<Block> {
        let before = std::mem::take(&mut self.computing);
        for thread in threads.iter().filter(|thread| thread.state == 'R') {
            let since = before.get(&thread.id).filter(|(sleeps, _)| *sleeps == thread.sleeps);
            self.computing.insert(thread.id, since.copied().unwrap_or((thread.sleeps, thread.cpu)));
        }
        threads.iter().find_map(|thread| {
            let (_, first) = self.computing.get(&thread.id)?;
            let user = thread.cpu.user.saturating_sub(first.user);
            let kernel = thread.cpu.kernel.saturating_sub(first.kernel);
            let spins = user >= self.patience && kernel * WORK < user;
            spins.then(|| Block::Spins { thread: thread.clone(), time: user })
        })
    }
}

fn threads(process: ProcessId) -> io::Result<Vec<Thread>> {
    let tasks =
        Process::new(process.pid.cast_signed()).and_then(|process| process.tasks()).map_err(io::Error::other)?;
    let mut threads = Vec::new();
    for task in tasks.take(THREADS) {
        // A thread that has ended in between does not wait.
        let Ok((id, status, stat)) = task.and_then(|task| Ok((task.tid, task.status()?, task.stat()?))) else {
            continue;
        };
        let time = |ticks: u64| Duration::from_millis(ticks.saturating_mul(1000) / procfs::ticks_per_second());
        threads.push(Thread {
            id,
            state: status.state.chars().next().unwrap_or('?'),
            sleeps: status.voluntary_ctxt_switches.unwrap_or_default(),
            call: call(process, id),
            cpu: CpuTime { user: time(stat.utime), kernel: time(stat.stime) },
        });
    }
    // Check after reading: the PID may belong to a later process.
    if process.exists()? { Ok(threads) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// The system call of a thread and its first argument.
fn call(process: ProcessId, thread: i32) -> Option<(i64, u64)> {
    let text = fs::read_to_string(format!("/proc/{}/task/{thread}/syscall", process.pid)).ok()?;
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let argument = u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()?;
    Some((number, argument))
}

fn describe(process: ProcessId, block: &Block) -> String {
    let (thread, time) = match block {
        Block::Stopped => return "is stopped by a signal or a debugger".to_owned(),
        Block::Waits { thread, time } => (thread, time),
        Block::Spins { thread, time } => {
            let seconds = time.as_secs();
            return format!(
                "is in an endless loop: thread {} has computed for {seconds} s and done nothing",
                thread.id
            );
        }
    };
    let place = fs::read_to_string(format!("/proc/{}/task/{}/wchan", process.pid, thread.id)).unwrap_or_default();
    let place = Some(place.trim()).filter(|place| !place.is_empty() && *place != "0");
    let place = place.map_or_else(String::new, |place| format!(" in {place}"));
    let what = thread.call.and_then(|(_, descriptor)| filesystem(process, descriptor));
    let what = what.map_or_else(|| "the host".to_owned(), |filesystem| format!("the filesystem {filesystem}"));
    let seconds = time.as_secs();
    format!("has waited for {what} for {seconds} s: thread {} is in state {}{place}", thread.id, thread.state)
}

/// The type and the source of the filesystem that an open file of the process is on. The file's own name is the guest's.
fn filesystem(process: ProcessId, descriptor: u64) -> Option<String> {
    let descriptor = i32::try_from(descriptor).ok()?;
    // Neither file is looked up: the kernel shows what it remembers.
    let file = fs::read_link(format!("/proc/{}/fd/{descriptor}", process.pid)).ok()?;
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.pid)).ok()?;
    let mounts = mounts.lines().filter_map(|line| MountInfo::from_line(line).ok());
    let above = mounts.filter(|mount| file.starts_with(&mount.mount_point));
    // The last of those with the longest path is on top.
    above
        .max_by_key(|mount| mount.mount_point.as_os_str().len())
        .map(|mount: MountInfo| format!("{} {:?}", mount.fs_type, mount.mount_source.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Unmounts in any case: whoever looks at the mount waits for ever.
    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }

    fn thread(state: char, sleeps: u64, call: Option<i64>) -> Thread {
        Thread { id: 7, state, sleeps, call: call.map(|number| (number, 3)), cpu: CpuTime::default() }
    }

    fn computes(state: char, sleeps: u64, user: u64, kernel: u64) -> Thread {
        let cpu = CpuTime { user: Duration::from_secs(user), kernel: Duration::from_secs(kernel) };
        Thread { cpu, ..thread(state, sleeps, None) }
    }

    #[test]
    fn a_process_spins_if_a_thread_computes_without_waiting_and_without_the_kernel() {
        for (first, second, expected) in [
            (computes('R', 5, 100, 50), computes('R', 5, 110, 50), true),
            (computes('R', 5, 100, 50), computes('R', 5, 109, 50), false),
            // It serves requests.
            (computes('R', 5, 100, 50), computes('R', 5, 110, 51), false),
            (computes('R', 5, 100, 50), computes('R', 6, 110, 50), false),
            (computes('S', 5, 100, 50), computes('R', 5, 110, 50), false),
            (computes('R', 5, 100, 50), computes('S', 5, 110, 50), false),
        ] {
            let (mut observer, now) = (Observer::default(), Instant::now());
            assert_eq!(observer.judge(vec![first.clone()], now), None, "{first:?}");
            let block = observer.judge(vec![second.clone()], now);
            assert_eq!(block.is_some(), expected, "{first:?} {second:?}: {block:?}");
        }
    }

    #[test]
    fn a_process_in_an_endless_loop_is_found() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        let mut observer = Observer { patience: Duration::from_millis(100), ..Observer::default() };
        let began = Instant::now();
        let trouble = loop {
            if let Some(trouble) = observer.look(id).unwrap() {
                break trouble;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "not found");
            std::thread::sleep(Duration::from_millis(10));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(trouble.endless && trouble.text.starts_with("is in an endless loop: thread "), "{trouble:?}");
    }

    #[test]
    fn a_process_is_blocked_if_it_is_stopped_or_a_thread_stays_in_one_call() {
        let (long, short) = (PATIENCE, PATIENCE - Duration::from_millis(1));
        let open = Some(libc::SYS_openat);
        // The thread at the first look, the time to the second, the thread then, and whether that is a block.
        for (first, time, second, expected) in [
            (thread('D', 5, open), long, thread('D', 5, open), true),
            (thread('D', 5, None), long, thread('D', 5, None), true),
            (thread('S', 5, open), long, thread('S', 5, open), true),
            (thread('D', 5, open), short, thread('D', 5, open), false),
            // It has slept again in between.
            (thread('D', 5, open), long, thread('D', 6, open), false),
            (thread('D', 5, open), long, thread('R', 5, open), false),
            (thread('S', 5, Some(libc::SYS_epoll_wait)), long, thread('S', 5, Some(libc::SYS_epoll_wait)), false),
            (thread('S', 5, None), long, thread('S', 5, None), false),
        ] {
            let (mut observer, start) = (Observer::default(), Instant::now());
            assert_eq!(observer.judge(vec![first.clone()], start), None, "{first:?}");
            let block = observer.judge(vec![second.clone()], start + time);
            assert_eq!(block.is_some(), expected, "{first:?} {time:?} {second:?}: {block:?}");
        }
        let mut observer = Observer::default();
        assert_eq!(observer.judge(vec![thread('T', 5, None)], Instant::now()), Some(Block::Stopped));
        assert_eq!(observer.judge(vec![thread('R', 5, None)], Instant::now()), None);
    }

    #[test]
    fn a_stopped_process_is_found_at_once_and_an_idle_one_is_not() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        let mut observer = Observer::default();
        assert_eq!(observer.look(id).unwrap(), None);
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WUNTRACED)).unwrap();
        let trouble = observer.look(id).unwrap().unwrap();
        assert_eq!((trouble.text.as_str(), trouble.endless), ("is stopped by a signal or a debugger", false));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(observer.look(id).is_err());
    }

    /// A filesystem whose server never answers, as of a hung network filesystem: `/dev/fuse` that nobody reads.
    #[test]
    fn a_process_that_waits_for_a_hung_filesystem_is_found_with_its_type() {
        use std::os::fd::AsRawFd;
        use std::os::unix::process::CommandExt;

        let server = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("hung:/export"), folder.path(), Some("fuse"), flags, Some(options.as_str())).unwrap();
        let _mounted = Mounted(folder.path());
        let path = std::ffi::CString::new(folder.path().to_str().unwrap()).unwrap();
        let mut command = std::process::Command::new("true");
        // SAFETY: the calls are async-signal-safe, on memory that was allocated before the fork.
        unsafe {
            command.pre_exec(move || {
                let folder = libc::open(path.as_ptr(), libc::O_PATH);
                libc::openat(folder, c"file".as_ptr(), libc::O_RDONLY);
                Ok(())
            })
        };
        // The child does not reach its exec, for which `spawn` waits.
        let spawned = std::thread::spawn(move || command.spawn());
        let own = std::process::id();
        let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/task/{pid}/syscall")).unwrap_or_default();
        let waits =
            |process: &procfs::process::Process| name(process.pid).starts_with(&format!("{} ", libc::SYS_openat));
        let found = loop {
            let child =
                |process: &procfs::process::Process| process.stat().is_ok_and(|stat| stat.ppid.cast_unsigned() == own);
            let all = procfs::process::all_processes().unwrap().filter_map(Result::ok);
            if let Some(process) = all.filter(child).find(waits) {
                break ProcessId::of(process.pid.cast_unsigned()).unwrap().unwrap();
            }
            std::thread::yield_now();
        };
        let mut observer = Observer::default();
        let start = Instant::now();
        assert_eq!(observer.judge(threads(found).unwrap(), start), None);
        let block = observer.judge(threads(found).unwrap(), start + PATIENCE).unwrap();
        let text = describe(found, &block);
        assert!(text.starts_with("has waited for the filesystem fuse \"hung:/export\" for 10 s: thread "), "{text}");
        found.kill(Duration::from_secs(5)).unwrap();
        // A child that is killed before its exec counts as started.
        if let Ok(mut child) = spawned.join().unwrap() {
            child.wait().unwrap();
        }
        drop(server);
    }
}
