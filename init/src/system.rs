//! The System service: the guest's version and resource use, its clock, and the sysctls of its sandbox.
//!
//! The process list comes from the `procfs` crate, whose parser libcontainer links anyway (6 KiB more). Its parsers of
//! /proc/meminfo and /proc/PID/status would add 57 KiB to every guest for four numbers, so [`field`] reads those.

use std::fs;
use std::io;
use std::path::Path;

use async_trait::async_trait;
use husk_protos::system::{ClockAdjustment, Hello, InfoRequest, InfoResponse, Sysctls};
use husk_protos::system_ttrpc::System;
use husk_protos::{HELD_NICS, PROTOCOL};
use procfs::process::all_processes;
use tokio::io::Interest;
use ttrpc::r#async::TtrpcContext;

use crate::boot::{Timeline, reseed};
use crate::clock::boottime_ns;
use crate::error::CallError;
use crate::fd::watch_fd;
use crate::rpc::handle;
use crate::{cgroup, clock, sandbox, uevents};

const MEMINFO: &str = "/proc/meminfo";

pub(crate) struct SystemService {
    /// The message that this guest sent when it became ready.
    pub(crate) hello: Hello,
}

/// Builds the guest's first message to the host.
pub(crate) fn hello(timeline: &Timeline, sandbox_pid: u32) -> Hello {
    let kernel = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
    Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        kernel: kernel.unwrap_or_default(),
        timeline: timeline.milestones().to_vec(),
        sandbox_pid,
        raw_streams: true,
        holds_nics: Path::new("/sys").join(HELD_NICS.1).exists(),
        ..Default::default()
    }
}

#[async_trait]
impl System for SystemService {
    async fn info(&self, _: &TtrpcContext, request: InfoRequest) -> ttrpc::Result<InfoResponse> {
        let info = async {
            let failed = |e| CallError::internal(format_args!("start CPU {}", request.start_cpu), &e);
            start_cpu(request.start_cpu).map_err(failed)?;
            let memory = request.await_memory_bytes;
            let failed = |e| CallError::internal(format_args!("wait for {memory} bytes of memory"), &e);
            await_memory(memory).await.map_err(failed)?;
            measure().map_err(|e| CallError::internal("measure the guest", &e))
        };
        let mut info = handle(info).await?;
        info.hello = Some(self.hello.clone()).into();
        Ok(info)
    }

    async fn adjust_clock(&self, _: &TtrpcContext, mut clock: ClockAdjustment) -> ttrpc::Result<ClockAdjustment> {
        if clock.by_ns != 0 {
            let failed = |e| CallError::internal(format_args!("adjust the clock by {} ns", clock.by_ns), &e);
            handle(async { clock::adjust(clock.by_ns, clock.gradually).map_err(failed) }).await?;
        }
        let seed = std::mem::take(&mut clock.seed);
        if !seed.is_empty() {
            let failed = |e| CallError::internal("seed the random number generator", &e);
            handle(async { reseed(&seed).map_err(failed) }).await?;
        }
        clock.realtime_ns = clock::realtime_ns();
        Ok(clock)
    }

    async fn set_sysctls(&self, _: &TtrpcContext, sysctls: Sysctls) -> ttrpc::Result<Sysctls> {
        handle(async { sandbox::set_sysctls(self.hello.sandbox_pid, sysctls.values) }).await?;
        Ok(Sysctls::new())
    }
}

/// Starts a virtual CPU, unless it runs. CPU 0 always does.
fn start_cpu(number: u32) -> io::Result<()> {
    let file = format!("/sys/devices/system/cpu/cpu{number}/online");
    // A second start would fail.
    if number == 0 || fs::read(&file)?.starts_with(b"1") { Ok(()) } else { fs::write(file, "1") }
}

/// Waits until the guest has this much memory in all. The caller limits the time.
async fn await_memory(bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // Subscribe before the first look: memory that comes in between would be missed. An event follows each block of
    // memory that the kernel has begun to use.
    let events = watch_fd(uevents::subscribe()?, Interest::READABLE)?;
    while memory_total(&fs::read_to_string(MEMINFO)?) < bytes {
        // In this order: an event that arrives after the draining would be missed otherwise.
        events.readable().await?.clear_ready();
        uevents::drain(events.get_ref(), |_| true)?;
    }
    Ok(())
}

fn memory_total(meminfo: &str) -> u64 {
    field(meminfo, "MemTotal:") * 1024
}

fn measure() -> io::Result<InfoResponse> {
    let status = fs::read_to_string("/proc/self/status")?;
    let memory = fs::read_to_string(MEMINFO)?;
    let switches = field(&status, "voluntary_ctxt_switches:") + field(&status, "nonvoluntary_ctxt_switches:");
    let (processes, zombies) = processes()?;
    Ok(InfoResponse {
        uptime_ns: boottime_ns(),
        init_rss_bytes: field(&status, "VmRSS:") * 1024,
        memory_total_bytes: memory_total(&memory),
        memory_available_bytes: field(&memory, "MemAvailable:") * 1024,
        init_cpu_usec: cpu_usec(cgroup::OWN)?,
        containers_cpu_usec: cpu_usec(cgroup::CONTAINERS)?,
        // Without the descriptor that reads the directory.
        init_open_fds: (fs::read_dir("/proc/self/fd")?.count() - 1) as u32,
        zombies,
        processes,
        container_cgroups: cgroup::count_below(cgroup::CONTAINERS.as_ref())?,
        init_context_switches: switches,
        ..Default::default()
    })
}

/// The number after `name` at the start of a line; 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

fn cpu_usec(group: &str) -> io::Result<u64> {
    Ok(field(&fs::read_to_string(format!("{group}/cpu.stat"))?, "usage_usec"))
}

/// The number of PID 1's children, and how many of them are zombies.
fn processes() -> io::Result<(u32, u32)> {
    let (mut children, mut zombies) = (0, 0);
    for process in all_processes().map_err(io::Error::other)? {
        // Fails when the process has just been reaped.
        let Ok(stat) = process.and_then(|process| process.stat()) else { continue };
        if stat.ppid == 1 {
            children += 1;
            zombies += u32::from(stat.state == 'Z');
        }
    }
    Ok((children, zombies))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_exact_name() {
        let text = "VmRSSx: 1 kB\nVmRSS:\t    3012 kB\nusage_usec 55\n";
        assert_eq!((field(text, "VmRSS:"), field(text, "usage_usec"), field(text, "absent")), (3012, 55, 0));
    }
}
