//! `husk status`: everything that is known about one sandbox.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Result;
use husk_shim::state::life::now_ms;
use husk_shim::state::status::{
    ContainerStatus, DiskStatus, FilesStatus, HealthStatus, MachineStatus, MemoryStatus, ProcessStatus, RootStatus,
    Status, SupervisorStatus, TransitionStatus, WatchedVolume,
};
use husk_shim::state::volumes::SharedVolume;

use crate::boot_profile::{bars, steps};
use crate::find::{self, Known};
use crate::network;
use crate::print::{self, duration, or_dash, shown};

pub(crate) fn run(id: &str, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let known = find::status(&state);
    let mut out = io::stdout().lock();
    if as_json {
        print::json(&mut out, &known)?;
    } else {
        out.write_all(page(&known, now_ms()).as_bytes())?;
    }
    Ok(())
}

/// The status as text, without terminal commands.
fn page(known: &Known<Status>, now_ms: u64) -> String {
    let (status, summary) = (&known.status, &known.status.summary);
    let mut page = String::new();
    let mut line = |title: &str, text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "{title:<12}{text}");
    };
    line("sandbox", format!("{} in namespace {}", shown(&summary.sandbox), shown(&summary.namespace)));
    if let Some(why) = &known.silence {
        line("NOTE", format!("{}; showing its last state on disk, which may be out of date", shown(why)));
    }
    let last = status.transitions.last();
    let since = last.map(|last| last.at_ms).or(summary.created_ms);
    let since = since.map_or_else(String::new, |at| format!(", for {}", duration(now_ms.saturating_sub(at))));
    let cause = last.map_or_else(String::new, |last| format!(": {}", shown(&last.cause)));
    line("state", format!("{}{since}{cause}", or_dash(summary.state.as_ref())));
    line("shim", process(summary.shim.pid, summary.shim.alive));
    match &summary.machine {
        Some(machine) => machine_lines(machine, &mut line),
        None => line("machine", "none has been started".to_owned()),
    }
    let live = status.live.as_ref();
    line("health", live.and_then(|live| live.health.as_ref()).map_or_else(|| "not known".to_owned(), health));
    line("supervisor", live.and_then(|live| live.supervisor.as_ref()).map_or_else(|| "none".to_owned(), supervisor));
    if let Some(used) = live.and_then(|live| live.memory.as_ref()) {
        line("memory", memory(used));
    }
    if let Some(open) = live.and_then(|live| live.files.as_ref()) {
        line("files", files(open));
        if let Some(problem) = &open.problem {
            line("WARNING", format!("the share does not respond: virtiofsd {}", shown(problem)));
        }
    }
    for RootStatus { container, kind, reason } in live.iter().flat_map(|live| &live.roots) {
        line("root", format!("of {}: {} ({})", shown(container), shown(kind), shown(reason)));
    }
    for attached in live.iter().flat_map(|live| &live.disks) {
        line("disk", disk(attached));
    }
    for shared in live.iter().flat_map(|live| &live.shared_volumes) {
        line("WARNING", shared_volume(shared));
    }
    if let Some(watches) = live.and_then(|live| live.watches.as_ref()) {
        watches.volumes.iter().for_each(|volume| line("watched", watched(volume)));
        if watches.overflows > 0 {
            line("WARNING", format!("the kernel's queue of changes has overflowed {} times", watches.overflows));
        }
    }
    line("folder", shown(&status.dir.to_string_lossy()));
    page.push_str("\ncontainers\n");
    page.push_str(&indented(&containers(&summary.containers)));
    page.push_str("\nnetwork\n");
    page.push_str(&indented(&network::page(live.and_then(|live| live.network.as_ref()))));
    page.push_str("\ntransitions\n");
    page.push_str(&indented(&transitions(&status.transitions)));
    let steps = steps(status.boot.as_ref().map_or(&[], |boot| &boot.milestones));
    if !steps.is_empty() {
        page.push_str("\nboot\n");
        page.push_str(&indented(&bars(&steps)));
    }
    page
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn process(pid: Option<u32>, alive: bool) -> String {
    format!("pid {}, {}", or_dash(pid), if alive { "alive" } else { "dead" })
}

fn machine_lines(machine: &MachineStatus, line: &mut impl FnMut(&str, String)) {
    let most = |most: u64, now: u64, unit: &str| {
        if most > now { format!(" of at most {most}{unit}") } else { unit.to_owned() }
    };
    let vcpus = format!("{}{}", machine.vcpus, most(machine.max_vcpus.into(), machine.vcpus.into(), " vCPU"));
    let memory = format!("{}{}", machine.memory_mib, most(machine.max_memory_mib, machine.memory_mib, " MiB"));
    let cid = machine.cid;
    let cache = match machine.cache_mib {
        0 => String::new(),
        mib => format!(", at most {mib} MiB of translated code"),
    };
    let (accel, board) = (shown(&machine.accel), shown(&machine.board));
    let process = process(Some(machine.pid), machine.alive);
    line("machine", format!("QEMU, {process}; {vcpus}, {memory}, CID {cid}, {accel} on {board}{cache}"));
    let version = |version: &Option<String>, file: &str| format!("{} from {}", or_dash(version.as_ref()), shown(file));
    line("kernel", version(&machine.kernel, &machine.kernel_file));
    line("init", version(&machine.init, &machine.initrd_file));
    if machine.user_mode {
        let ports = machine.ports.iter().map(|port| shown(port)).collect::<Vec<_>>().join(", ");
        line("network", if ports.is_empty() { "user mode".to_owned() } else { format!("user mode, ports {ports}") });
    }
    if machine.debug {
        line("debug", "on: a shell on the console, and husk exec".to_owned());
    }
}

fn health(health: &HealthStatus) -> String {
    if let Some(cause) = &health.cause_of_death {
        return format!("dead: {}", shown(cause));
    }
    let beats = &health.heartbeats;
    format!(
        "{}: last heartbeat {} ago, expected every {}, {} missed",
        match beats.missed {
            0 => "good",
            _ if beats.starved => "starved: the host gives the VM too little CPU time",
            _ => "heartbeats are missing",
        },
        duration(beats.since_heartbeat_ms),
        duration(beats.heartbeat_interval_ms),
        beats.missed
    )
}

fn memory(memory: &MemoryStatus) -> String {
    let MemoryStatus { on_host_mib, balloon_target_mib, balloon_mib } = memory;
    let mut text = format!("the guest takes {} MiB of the host's memory", or_dash(on_host_mib.as_ref()));
    if let Some(target) = balloon_target_mib {
        let given = or_dash(balloon_mib.as_ref());
        let _ = write!(text, "; {given} MiB in the balloon, for a target of {target} MiB");
    }
    text
}

fn files(files: &FilesStatus) -> String {
    let FilesStatus { open, limit, configured, problem: _ } = files;
    let mut text = format!("virtiofsd has {} open, of at most {limit}", or_dash(open.as_ref()));
    if limit < configured {
        let _ = write!(text, "; the host does not allow the configured {configured}");
    }
    text
}

fn disk(disk: &DiskStatus) -> String {
    let DiskStatus { serial, path, read_only, bytes, state, protection, containers } = disk;
    format!(
        "{}: {}, {} MiB, {}, {}{} for {}",
        shown(serial),
        shown(&path.to_string_lossy()),
        bytes >> 20,
        if *read_only { "read-only" } else { "read-write" },
        protection.as_deref().map_or_else(String::new, |protection| format!("{}, ", shown(protection))),
        shown(state),
        containers.iter().map(|container| shown(container)).collect::<Vec<_>>().join(", ")
    )
}

fn shared_volume(shared: &SharedVolume) -> String {
    format!(
        "sandbox {} in namespace {} can write to {} too: file locks and inotify do not work between two VMs",
        shown(&shared.sandbox),
        shown(&shared.namespace),
        shown(&shared.path.to_string_lossy())
    )
}

fn watched(volume: &WatchedVolume) -> String {
    let WatchedVolume { path, problem, reported, lost } = volume;
    let path = shown(&path.to_string_lossy());
    match problem {
        Some(problem) => format!("{path}: not watched: {}; {reported} changes reported, {lost} lost", shown(problem)),
        None => format!("{path}: {reported} changes reported, {lost} lost"),
    }
}

fn supervisor(supervisor: &SupervisorStatus) -> String {
    let mut text = shown(&supervisor.state);
    if let Some(pid) = supervisor.pid {
        let _ = write!(text, ", pid {pid}");
    }
    let _ = write!(text, ", restarts {}", supervisor.restarts);
    if let Some(ms) = supervisor.wait_ms {
        let _ = write!(text, ", restarts again in {}", duration(ms));
    }
    if let Some(exit) = &supervisor.last_end {
        let _ = write!(text, ", last exit: {}", shown(exit));
    }
    text
}

fn containers(containers: &[ContainerStatus]) -> String {
    let mut rows = vec![["CONTAINER", "PROCESS", "PID IN GUEST", "STATE"].map(str::to_owned).to_vec()];
    for container in containers {
        let id = shown(&container.id);
        let processes = container.processes.as_deref().unwrap_or_default();
        if processes.is_empty() {
            let state = if container.creating { "being created" } else { "not known" };
            rows.push(vec![id.clone(), "-".to_owned(), "-".to_owned(), state.to_owned()]);
        }
        for ProcessStatus { exec, pid, exit_status } in processes {
            let pid = Some(pid).filter(|pid| **pid != 0);
            let state = match (exit_status, pid) {
                (Some(status), _) => format!("exited with {status}"),
                (None, Some(_)) => "alive".to_owned(),
                (None, None) => "not started".to_owned(),
            };
            let exec = if exec.is_empty() { "init".to_owned() } else { shown(exec) };
            rows.push(vec![id.clone(), exec, or_dash(pid), state]);
        }
    }
    if rows.len() == 1 { "none\n".to_owned() } else { print::table(&rows) }
}

fn transitions(transitions: &[TransitionStatus]) -> String {
    let row = |made: &TransitionStatus| {
        let states = format!("{} -> {}", shown(&made.from.to_string()), shown(&made.to.to_string()));
        vec![shown(&made.at), states, shown(&made.cause)]
    };
    let rows: Vec<Vec<String>> = transitions.iter().map(row).collect();
    if rows.is_empty() { "none\n".to_owned() } else { print::table(&rows) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn known(status: Value, silence: Option<&str>) -> Known<Status> {
        Known { status: serde_json::from_value(status).unwrap(), silence: silence.map(str::to_owned) }
    }

    #[test]
    fn a_full_status_has_every_line_and_no_terminal_commands() {
        let status = json!({
            "sandbox": "web", "namespace": "default", "created_ms": 1000, "state": "Failed",
            "shim": {"pid": 10, "alive": true},
            "machine": {"pid": 11, "alive": false, "cid": 3, "vcpus": 2, "max_vcpus": 2, "memory_mib": 256,
                "max_memory_mib": 1024, "cache_mib": 64, "accel": "Tcg", "board": "Microvm", "kernel": "6.12\u{1b}[2J",
                "init": "0.1.0", "kernel_file": "/k", "initrd_file": "/i"},
            "health": {"heartbeat_interval_ms": 10000, "since_heartbeat_ms": 12000, "missed": 1, "alive": true,
                "cause_of_death": null},
            "supervisor": {"state": "waiting", "pid": null, "restarts": 3, "last_end": "exited with\u{7} status 1",
                "wait_ms": 4000},
            "shared_volumes": [{"path": "/srv/a\u{1b}", "namespace": "default", "sandbox": "db"}],
            "watches": {"overflows": 2, "volumes": [{"path": "/srv/c\u{1b}", "reported": 7, "lost": 1},
                {"path": "/srv/d", "problem": "no\u{7}"}]},
            "memory": {"on_host_mib": 41, "balloon_target_mib": 128, "balloon_mib": 127},
            "disks": [{"serial": "volume-1\u{1b}", "path": "/v/pg.img", "bytes": 33_554_432, "state": "mounted",
                "containers": ["web"]}, {"serial": "layer-2", "path": "/l", "read_only": true, "bytes": 1 << 20,
                "state": "mounted", "protection": "verified\u{1b}", "containers": ["web"]}],
            "roots": [{"container": "web\u{1b}", "kind": "overlay", "reason": "configured"}],
            "files": {"open": 700, "limit": 20000, "configured": 131_072},
            "network": {"netns": "/run/netns/web", "links": [{"mac": "02:00:00:00:00:01",
                "guest": {"name": "eth0", "mtu": 1500, "up": true, "carrier": true}}]},
            "containers": [{"id": "web", "processes": [
                {"exec": "", "pid": 20, "exit_status": null},
                {"exec": "sh\u{1b}", "pid": 21, "exit_status": 137},
                {"exec": "later", "pid": 0, "exit_status": null}]},
                {"id": "new", "creating": true}],
            "transitions": [{"from": "Running", "to": "Failed", "cause": "QEMU was killed\nby signal 9",
                "at": "2026-01-01T00:00:00Z", "at_ms": 2000}],
            "boot": {"milestones": [{"side": "host", "name": "QEMU started", "at_us": 5000}]},
            "dir": "/run/husk/default/web",
        });
        let page = page(&known(status, None), 62_000);
        assert!(!page.contains(|c: char| c.is_control() && c != '\n'), "{page}");
        let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
        for expected in [
            "sandbox     web in namespace default",
            "state       Failed, for 1m00s: QEMU was killed^Jby signal 9",
            "shim        pid 10, alive",
            "machine     QEMU, pid 11, dead; 2 vCPU, 256 of at most 1024 MiB, CID 3, Tcg on Microvm, at most 64 MiB of translated code",
            "kernel      6.12^[[2J from /k",
            "init        0.1.0 from /i",
            "health      heartbeats are missing: last heartbeat 12.0 s ago, expected every 10.0 s, 1 missed",
            "supervisor  waiting, restarts 3, restarts again in 4.0 s, last exit: exited with^G status 1",
            "memory      the guest takes 41 MiB of the host's memory; 127 MiB in the balloon, for a target of 128 MiB",
            "files       virtiofsd has 700 open, of at most 20000; the host does not allow the configured 131072",
            "WARNING     sandbox db in namespace default can write to /srv/a^[ too: file locks and inotify do not work between two VMs",
            "disk        volume-1^[: /v/pg.img, 32 MiB, read-write, mounted for web",
            "disk        layer-2: /l, 1 MiB, read-only, verified^[, mounted for web",
            "root        of web^[: overlay (configured)",
            "watched     /srv/c^[: 7 changes reported, 1 lost",
            "watched     /srv/d: not watched: no^G; 0 changes reported, 0 lost",
            "WARNING     the kernel's queue of changes has overflowed 2 times",
            "folder      /run/husk/default/web",
            "  web        init     20            alive",
            "  web        sh^[     21            exited with 137",
            "  web        later    -             not started",
            "  new        -        -             being created",
            "  connected to the namespace /run/netns/web",
            "  eth0  02:00:00:00:00:01  1500  up     -            0 B in 0 packets  0 B in 0 packets  -",
            "  2026-01-01T00:00:00Z  Running -> Failed  QEMU was killed^Jby signal 9",
        ] {
            assert!(lines.contains(&expected), "no {expected:?} in\n{page}");
        }
        assert!(page.contains("start QEMU's process"), "{page}");
    }

    #[test]
    fn names_of_another_version_contain_no_terminal_commands_either() {
        let status = json!({
            "sandbox": "w\u{1b}", "namespace": "n\u{1b}", "state": "S\u{1b}", "dir": "/\u{1b}",
            "machine": {"accel": "A\u{1b}", "board": "B\u{1b}", "kernel_file": "\u{1b}", "initrd_file": "\u{1b}"},
            "containers": [{"id": "c\u{1b}"}],
            "transitions": [{"from": "F\u{1b}", "to": "T\u{1b}", "cause": "\u{1b}", "at": "\u{1b}"}],
            "boot": {"milestones": [{"side": "guest", "name": "N\u{1b}", "at_us": 5}]},
            "supervisor": {"state": "\u{1b}"},
            "health": {"cause_of_death": "\u{1b}"},
        });
        let page = page(&known(status, Some("\u{1b}")), 0);
        assert!(!page.contains('\u{1b}') && page.contains("up to \"N^[\""), "{page}");
    }

    #[test]
    fn unknown_values_are_shown_as_unknown() {
        let shim = json!({"pid": null, "alive": false});
        let bare = json!({"sandbox": "web", "namespace": "default", "state": "Pending", "shim": shim});
        let page = page(&known(bare, Some("its shim is dead")), 0);
        for expected in [
            "NOTE        its shim is dead; showing its last state on disk, which may be out of date",
            "state       Pending",
            "machine     none has been started",
            "health      not known",
            "supervisor  none",
            "network",
            "  not known",
        ] {
            assert!(page.lines().any(|line| line == expected), "no {expected:?} in\n{page}");
        }
    }
}
