//! The System service: what the guest is and what it uses.

use std::fs;
use std::io;

use async_trait::async_trait;
use husk_protos::PROTOCOL;
use husk_protos::system::{Hello, InfoRequest, InfoResponse};
use husk_protos::system_ttrpc::System;
use ttrpc::r#async::TtrpcContext;

use crate::boot::{Timeline, boottime_ns};
use crate::cgroup;
use crate::error::Error;
use crate::rpc::answer;

/// The System service.
pub struct Service {
    /// What the host was told at the start.
    pub hello: Hello,
}

/// The guest's first words.
pub fn hello(timeline: &Timeline) -> Hello {
    let kernel = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
    Hello {
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        kernel: kernel.unwrap_or_default(),
        timeline: timeline.milestones().to_vec(),
        ..Default::default()
    }
}

#[async_trait]
impl System for Service {
    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        let mut info = answer(async { measure().map_err(|e| Error::internal("measure the guest", &e)) }).await?;
        info.hello = Some(self.hello.clone()).into();
        Ok(info)
    }
}

fn measure() -> io::Result<InfoResponse> {
    let status = fs::read_to_string("/proc/self/status")?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    let switches = field(&status, "voluntary_ctxt_switches:") + field(&status, "nonvoluntary_ctxt_switches:");
    let (processes, zombies) = processes()?;
    Ok(InfoResponse {
        uptime_ns: boottime_ns(),
        init_rss_bytes: field(&status, "VmRSS:") * 1024,
        memory_total_bytes: field(&memory, "MemTotal:") * 1024,
        memory_available_bytes: field(&memory, "MemAvailable:") * 1024,
        init_cpu_usec: cpu_usec(cgroup::OWN)?,
        containers_cpu_usec: cpu_usec(cgroup::CONTAINERS)?,
        // Without the one that reads the folder.
        init_open_fds: (fs::read_dir("/proc/self/fd")?.count() - 1) as u32,
        zombies,
        processes,
        container_cgroups: cgroup::count_below(cgroup::CONTAINERS.as_ref())?,
        init_context_switches: switches,
        ..Default::default()
    })
}

/// The number after `name` at the beginning of a line; the kernel always has it.
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

/// PID 1's children, and those of them that nobody has reaped.
fn processes() -> io::Result<(u32, u32)> {
    let (mut children, mut zombies) = (0, 0);
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else { continue };
        // One that has just gone is neither.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        if let Some((state, parent)) = state_and_parent(&stat)
            && parent == 1
        {
            children += 1;
            zombies += u32::from(state == "Z");
        }
    }
    Ok((children, zombies))
}

/// The third and fourth fields of proc_pid_stat(5). The second is a name in parentheses, which may hold anything.
fn state_and_parent(stat: &str) -> Option<(&str, i32)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    Some((fields.next()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_nasty_name_is_read_right() {
        assert_eq!(state_and_parent("12 (a b) S 1 12 0"), Some(("S", 1)));
        assert_eq!(state_and_parent("12 (x) Z 7) Z 1 12 0"), Some(("Z", 1)));
        assert_eq!(state_and_parent("12 (x"), None);
    }

    #[test]
    fn fields_are_found_by_their_names() {
        let text = "VmRSSx: 1 kB\nVmRSS:\t    3012 kB\nusage_usec 55\n";
        assert_eq!((field(text, "VmRSS:"), field(text, "usage_usec"), field(text, "absent")), (3012, 55, 0));
    }
}
