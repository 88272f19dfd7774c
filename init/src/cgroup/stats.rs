//! A container's resource use as containerd's `io.containerd.cgroups.v2.Metrics`: every field for which the kernel has
//! a file.

use std::fs;
use std::io;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData, PSIStats, PidsStat,
};
use procfs::net::DeviceStatus;
use procfs::process::Process;
use protobuf::MessageField;

use super::file::{number, read};

/// Reads a group's metrics. Fields whose file the kernel does not have stay empty.
///
/// # Errors
/// Those of the kernel, with the file's name.
pub(crate) fn measure(group: &Path) -> io::Result<Metrics> {
    let file = |name: &str| read(group, name);
    let single = |name: &str| file(name).map(|text| text.as_deref().map_or(0, value));
    let psi = |name: &str| file(name).map(|text| text.as_deref().map(pressure).into());

    let mut cpu = file("cpu.stat")?.as_deref().map(cpu).unwrap_or_default();
    cpu.psi = psi("cpu.pressure")?;
    let mut memory = file("memory.stat")?.as_deref().map(memory).unwrap_or_default();
    memory.usage = single("memory.current")?;
    memory.usage_limit = single("memory.max")?;
    memory.max_usage = single("memory.peak")?;
    memory.swap_usage = single("memory.swap.current")?;
    memory.swap_limit = single("memory.swap.max")?;
    memory.swap_max_usage = single("memory.swap.peak")?;
    memory.psi = psi("memory.pressure")?;
    let usage = file("io.stat")?.as_deref().map(devices).unwrap_or_default();
    Ok(Metrics {
        pids: MessageField::some(PidsStat {
            current: single("pids.current")?,
            limit: single("pids.max")?,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory),
        memory_events: file("memory.events")?.as_deref().map(memory_events).into(),
        io: MessageField::some(IOStat { usage, psi: psi("io.pressure")?, ..Default::default() }),
        hugetlb: hugetlb(group)?,
        ..Default::default()
    })
}

/// The network interfaces of a process's namespace, sorted by name. Empty when the process has exited, or when the
/// kernel's list cannot be parsed.
pub(crate) fn network(pid: i32) -> Vec<NetworkStat> {
    let interfaces = Process::new(pid).and_then(|process| process.dev_status()).unwrap_or_default();
    let mut stats: Vec<_> = interfaces.into_values().map(interface).collect();
    stats.sort_by(|one, other| one.name.cmp(&other.name));
    stats
}

fn interface(counters: DeviceStatus) -> NetworkStat {
    NetworkStat {
        name: counters.name,
        rx_bytes: counters.recv_bytes,
        rx_packets: counters.recv_packets,
        rx_errors: counters.recv_errs,
        rx_dropped: counters.recv_drop,
        tx_bytes: counters.sent_bytes,
        tx_packets: counters.sent_packets,
        tx_errors: counters.sent_errs,
        tx_dropped: counters.sent_drop,
        ..Default::default()
    }
}

/// Parses a file with one number or `max`, which containerd represents as the largest number.
fn value(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

fn cpu(text: &str) -> CPUStat {
    let field = |key| number(text, key);
    CPUStat {
        usage_usec: field("usage_usec"),
        user_usec: field("user_usec"),
        system_usec: field("system_usec"),
        nr_periods: field("nr_periods"),
        nr_throttled: field("nr_throttled"),
        throttled_usec: field("throttled_usec"),
        nr_bursts: field("nr_bursts"),
        burst_usec: field("burst_usec"),
        ..Default::default()
    }
}

fn memory(text: &str) -> MemoryStat {
    let field = |key| number(text, key);
    MemoryStat {
        anon: field("anon"),
        file: field("file"),
        kernel_stack: field("kernel_stack"),
        slab: field("slab"),
        sock: field("sock"),
        shmem: field("shmem"),
        file_mapped: field("file_mapped"),
        file_dirty: field("file_dirty"),
        file_writeback: field("file_writeback"),
        anon_thp: field("anon_thp"),
        inactive_anon: field("inactive_anon"),
        active_anon: field("active_anon"),
        inactive_file: field("inactive_file"),
        active_file: field("active_file"),
        unevictable: field("unevictable"),
        slab_reclaimable: field("slab_reclaimable"),
        slab_unreclaimable: field("slab_unreclaimable"),
        pgfault: field("pgfault"),
        pgmajfault: field("pgmajfault"),
        // Linux 5.9 split these counters by anon and file. The message has one field for the sum.
        workingset_refault: field("workingset_refault_anon") + field("workingset_refault_file"),
        workingset_activate: field("workingset_activate_anon") + field("workingset_activate_file"),
        workingset_nodereclaim: field("workingset_nodereclaim"),
        pgrefill: field("pgrefill"),
        pgscan: field("pgscan"),
        pgsteal: field("pgsteal"),
        pgactivate: field("pgactivate"),
        pgdeactivate: field("pgdeactivate"),
        pglazyfree: field("pglazyfree"),
        pglazyfreed: field("pglazyfreed"),
        thp_fault_alloc: field("thp_fault_alloc"),
        thp_collapse_alloc: field("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let field = |key| number(text, key);
    MemoryEvents {
        low: field("low"),
        high: field("high"),
        max: field("max"),
        oom: field("oom"),
        oom_kill: field("oom_kill"),
        oom_group_kill: field("oom_group_kill"),
        ..Default::default()
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full` (accounting/psi.rst).
fn pressure(text: &str) -> PSIStats {
    let line = |kind: &str| {
        let fields = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = |key: &str| fields.split_ascii_whitespace().find_map(|field| field.strip_prefix(key));
        let average = |key| field(key).and_then(|value| value.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10="),
            avg60: average("avg60="),
            avg300: average("avg300="),
            total: field("total=").and_then(|value| value.parse().ok()).unwrap_or(0),
            ..Default::default()
        })
    };
    PSIStats { some: line("some ").into(), full: line("full ").into(), ..Default::default() }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`, one line per device.
fn devices(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let (device, fields) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let field = |key: &str| {
            let text = fields.split_ascii_whitespace().find_map(|field| field.strip_prefix(key));
            text.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: field("rbytes="),
            wbytes: field("wbytes="),
            rios: field("rios="),
            wios: field("wios="),
            ..Default::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

/// One entry per page size for which the group has a file (`hugetlb.2MB.current`). The message has no field for
/// reservations (`hugetlb.2MB.rsvd.current`).
fn hugetlb(group: &Path) -> io::Result<Vec<HugeTlbStat>> {
    let mut sizes = Vec::new();
    for entry in fs::read_dir(group)? {
        let name = entry?.file_name();
        let size = name.to_str().and_then(|name| name.strip_prefix("hugetlb.")?.strip_suffix(".current"));
        if let Some(size) = size.filter(|size| !size.contains('.')) {
            let file = |what: &str| read(group, &format!("hugetlb.{size}.{what}"));
            sizes.push(HugeTlbStat {
                pagesize: size.to_owned(),
                current: file("current")?.as_deref().map_or(0, value),
                max: file("max")?.as_deref().map_or(0, value),
                failcnt: file("events")?.as_deref().map_or(0, |text| number(text, "max")),
                ..Default::default()
            });
        }
    }
    Ok(sizes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formats_of_the_kernels_files_are_parsed() {
        assert_eq!([value("12\n"), value("max\n"), value("")], [12, u64::MAX, 0]);

        let memory = memory("anon 1\nfile 2\nanon_thp 3\nworkingset_refault_anon 4\nworkingset_refault_file 5\n");
        assert_eq!((memory.anon, memory.file, memory.anon_thp, memory.workingset_refault), (1, 2, 3, 9));

        let psi = pressure(
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
        );
        assert_eq!((psi.some.avg10, psi.some.avg60, psi.some.total, psi.full.total), (1.5, 0.25, 77, 5));

        let io = devices("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:0\n");
        assert_eq!(io.len(), 1, "a device without counters is skipped");
        let io = &io[0];
        assert_eq!((io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios), (8, 16, 1, 2, 3, 4));
    }

    #[test]
    fn the_loopback_interface_is_measured() {
        let interfaces = network(std::process::id() as i32);
        assert!(interfaces.iter().any(|interface| interface.name == "lo"), "{interfaces:?}");
        assert!(network(i32::MAX).is_empty(), "no such process");
    }

    #[test]
    fn each_counter_of_an_interface_is_in_its_own_field() {
        let device = DeviceStatus {
            name: "eth0".into(),
            recv_bytes: 1,
            recv_packets: 2,
            recv_errs: 3,
            recv_drop: 4,
            recv_fifo: 0,
            recv_frame: 0,
            recv_compressed: 0,
            recv_multicast: 0,
            sent_bytes: 5,
            sent_packets: 6,
            sent_errs: 7,
            sent_drop: 8,
            sent_fifo: 0,
            sent_colls: 0,
            sent_carrier: 0,
            sent_compressed: 0,
        };
        let stat = interface(device);
        let received = [stat.rx_bytes, stat.rx_packets, stat.rx_errors, stat.rx_dropped];
        let sent = [stat.tx_bytes, stat.tx_packets, stat.tx_errors, stat.tx_dropped];
        assert_eq!((stat.name.as_str(), received, sent), ("eth0", [1, 2, 3, 4], [5, 6, 7, 8]));
    }

    #[test]
    fn a_file_that_the_kernel_lacks_is_no_error() {
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("hugetlb.2MB.current"), "2097152\n").unwrap();
        fs::write(group.path().join("hugetlb.2MB.rsvd.current"), "0\n").unwrap();
        fs::write(group.path().join("hugetlb.2MB.events"), "max 3\n").unwrap();
        let metrics = measure(group.path()).unwrap();
        assert!(metrics.memory_events.is_none() && metrics.cpu.psi.is_none());
        assert_eq!(metrics.hugetlb.len(), 1);
        assert_eq!((metrics.hugetlb[0].current, metrics.hugetlb[0].failcnt), (2_097_152, 3));
    }
}
