//! The guest kernel's command line. Pure: a function of what the shim passes to the guest, of the board, and of how
//! instructions are executed.
//!
//! The kernel cuts its command line off at 2048 bytes (COMMAND_LINE_SIZE) without a message. `config/kernel_params.rs`
//! bounds the configured part.

use husk_protos::extras::SERIAL;
use husk_protos::mac::mac_text;
use husk_protos::{HELD_NICS, param};

use crate::vmm::machine::{Accel, GuestParams};

/// Parameters of every guest's kernel (Documentation/admin-guide/kernel-parameters.txt).
///
/// - `reboot=t`, `panic=-1`: the VMM exits when the guest resets. Both a shutdown and a panic reset it, without ACPI by
///   a triple fault.
/// - `no_timer_check`: the kernel compares the ticks of an emulated timer with the host's time stamp counter. On a
///   loaded host the ticks are so late that the kernel panics for lack of a timer.
/// - `rcupdate.rcu_expedited`: mounts and cgroups wait for grace periods, which otherwise take several ticks of an idle
///   guest.
/// - `noreplace-smp`: without it, a kernel with one processor removes its 7,700 lock prefixes at boot, each between two
///   changes of the page tables. That is a tenth of a boot without KVM.
pub const COMMON: [&str; 7] =
    ["console=ttyS0", "quiet", "reboot=t", "panic=-1", "no_timer_check", "rcupdate.rcu_expedited=1", "noreplace-smp"];

/// What the kernel has to know about the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Platform {
    /// The board has ACPI and PCI.
    pub(crate) acpi_and_pci: bool,
    /// Frequency of the emulated APIC timer, kHz.
    pub(crate) apic_timer_khz: u64,
}

/// The command line. `tsc_khz` is the frequency of the host's time stamp counter, if known.
pub(crate) fn kernel_cmdline(guest: &GuestParams, platform: Platform, accel: Accel, tsc_khz: Option<u64>) -> String {
    let mut words = COMMON.map(String::from).to_vec();
    if !platform.acpi_and_pci {
        // Spares the kernel the search.
        words.extend(["acpi=off", "pci=off"].map(String::from));
    }
    if accel != Accel::Kvm {
        words.extend(emulation(platform, accel, tsc_khz));
    }
    if let Some(vcpus) = guest.vcpus {
        // The init starts others on request.
        words.push(format!("maxcpus={vcpus}"));
    }
    if let Some(max) = guest.max_inodes {
        // From kernel-config/patches: without it, a guest that looks at many files drives virtiofsd into its limit.
        words.push(format!("virtiofs.max_inodes={max}"));
    }
    if guest.disks {
        // Spares the kernel the search for disks of a controller that has none when it boots, and all further searches
        // but those for a single number.
        words.push("scsi_mod.scan=manual".to_owned());
    }
    if !guest.held_nics.is_empty() {
        let macs: Vec<String> = guest.held_nics.iter().map(|mac| mac_text(mac)).collect();
        words.push(format!("{}={}", HELD_NICS.0, macs.join(",")));
    }
    words.extend(init(guest));
    words.join(" ")
}

/// Parameters of a kernel without hardware virtualization.
///
/// - `norandmaps`: for PID 1 only, which reverts it for its children: PID 1 and its workers are loaded at the same
///   address and translated once.
/// - `randmaps_once` (from kernel-config/patches): the others are loaded at addresses that are chosen once per boot.
/// - `noreplace-returns` (from kernel-config/patches): spares the boot a change of the kernel's code.
/// - `init_on_alloc=0`: husk's kernel zeroes what it allocates, which takes an eighth of a boot. Whoever accepts emulation
///   runs no untrusted code; the configuration may still enable it.
/// - `virtiofs.rewrite_pages` (from kernel-config/patches): without it, the guest executes stale pages of programs on
///   the share.
pub const EMULATION: [&str; 5] =
    ["norandmaps", "randmaps_once", "noreplace-returns", "init_on_alloc=0", "virtiofs.rewrite_pages=1"];

/// [`EMULATION`], and the frequencies of the emulated clocks.
fn emulation(platform: Platform, accel: Accel, tsc_khz: Option<u64>) -> Vec<String> {
    let mut words = EMULATION.map(String::from).to_vec();
    // The guest's counter is the host's, or counts instructions, one a nanosecond. KVM has kvmclock and the TSC's
    // deadline timer instead.
    let tsc_khz = if accel == Accel::TcgCounted { Some(1_000_000) } else { tsc_khz };
    if let Some(khz) = tsc_khz {
        words.push(format!("tsc_early_khz={khz}"));
        // The host vouches for it: the guest has only emulated clocks to check it against.
        words.push("tsc=reliable".to_owned());
        words.push(format!("lapic_timer_khz={}", platform.apic_timer_khz));
    }
    words
}

/// Parameters for the init, with those of the configuration between them.
fn init(guest: &GuestParams) -> Vec<String> {
    let mut words = vec![
        format!("{}={}", param::LOG, guest.log_level.as_str().to_lowercase()),
        format!("{}={}", param::HEARTBEAT_MS, guest.heartbeat.as_millis()),
    ];
    if guest.debug {
        // After `quiet`, to override it, and before the configuration, which overrides both.
        words.extend([format!("{}=1", param::DEBUG), "loglevel=7".to_owned()]);
    }
    if guest.io_uring {
        // husk's kernel disables it by default (kernel-config/patches/io-uring-off.patch).
        words.push("sysctl.kernel.io_uring_disabled=0".to_owned());
    }
    if !guest.user_namespaces {
        words.push("sysctl.user.max_user_namespaces=0".to_owned());
    }
    words.extend(guest.configured.iter().cloned());
    if guest.extras {
        words.push(format!("{}={SERIAL}", param::EXTRAS));
    }
    if guest.supervisor {
        words.push(format!("{}=1", param::SUPERVISOR));
    }
    if guest.sandbox {
        words.push(format!("{}=1", param::SANDBOX));
    }
    if let Some(hostname) = &guest.hostname {
        words.push(format!("{}={hostname}", param::HOSTNAME));
    }
    if let Some(now) = guest.wall_clock {
        words.push(format!("{}={}", param::EPOCH_NS, now.as_nanos()));
    }
    if let Some(port) = guest.ready_port {
        words.push(format!("{}={port}", param::READY_PORT));
    }
    words
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use tracing::Level;

    use super::*;

    const PLATFORM: Platform = Platform { acpi_and_pci: false, apic_timer_khz: 5 };
    const START: &str =
        "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp acpi=off pci=off";

    pub(crate) fn guest() -> GuestParams {
        GuestParams {
            log_level: Level::WARN,
            heartbeat: Duration::from_secs(10),
            debug: false,
            io_uring: false,
            user_namespaces: true,
            configured: Vec::new(),
            extras: false,
            supervisor: false,
            disks: false,
            sandbox: false,
            vcpus: None,
            max_inodes: None,
            hostname: None,
            held_nics: Vec::new(),
            wall_clock: None,
            ready_port: None,
        }
    }

    #[test]
    fn the_board_and_the_accelerator_decide_the_kernels_parameters() {
        let with_acpi = Platform { acpi_and_pci: true, ..PLATFORM };
        let emulated = "norandmaps randmaps_once noreplace-returns init_on_alloc=0 virtiofs.rewrite_pages=1";
        let without_acpi = START.strip_suffix(" acpi=off pci=off").unwrap();
        let table = [
            (PLATFORM, Accel::Kvm, None, START.to_owned()),
            // KVM's guests know the counter's frequency.
            (PLATFORM, Accel::Kvm, Some(2_400_000), START.to_owned()),
            (PLATFORM, Accel::Tcg, None, format!("{START} {emulated}")),
            (
                PLATFORM,
                Accel::Tcg,
                Some(2_400_000),
                format!("{START} {emulated} tsc_early_khz=2400000 tsc=reliable lapic_timer_khz=5"),
            ),
            (
                PLATFORM,
                Accel::TcgCounted,
                Some(2_400_000),
                format!("{START} {emulated} tsc_early_khz=1000000 tsc=reliable lapic_timer_khz=5"),
            ),
            // The kernel searches for ACPI and PCI.
            (with_acpi, Accel::Tcg, None, format!("{without_acpi} {emulated}")),
        ];
        for (platform, accel, tsc_khz, expected) in table {
            let expected = format!("{expected} husk.log=warn husk.heartbeat_ms=10000");
            assert_eq!(kernel_cmdline(&guest(), platform, accel, tsc_khz), expected, "{platform:?} {accel:?}");
        }
        let held_nics = vec![[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 0xff]];
        let guest = GuestParams { vcpus: Some(2), max_inodes: Some(10), held_nics, ..guest() };
        let held = "virtio_net.held=02:00:00:00:00:01,02:00:00:00:00:ff";
        let expected = format!("{START} maxcpus=2 virtiofs.max_inodes=10 {held} husk.log=warn husk.heartbeat_ms=10000");
        assert_eq!(kernel_cmdline(&guest, PLATFORM, Accel::Kvm, None), expected);
    }

    #[test]
    fn the_inits_parameters_follow_the_kernels_and_the_configuration_overrides_debug_mode() {
        type Change = fn(&mut GuestParams);
        let table: &[(Change, &str)] = &[
            (|guest| guest.log_level = Level::TRACE, "husk.log=trace husk.heartbeat_ms=10000"),
            (|guest| guest.heartbeat = Duration::from_millis(7), "husk.log=warn husk.heartbeat_ms=7"),
            (
                |guest| (guest.debug, guest.configured) = (true, vec!["loglevel=3".into(), "nosmt".into()]),
                "husk.log=warn husk.heartbeat_ms=10000 husk.debug=1 loglevel=7 loglevel=3 nosmt",
            ),
            (|guest| guest.io_uring = true, "husk.log=warn husk.heartbeat_ms=10000 sysctl.kernel.io_uring_disabled=0"),
            (
                |guest| guest.user_namespaces = false,
                "husk.log=warn husk.heartbeat_ms=10000 sysctl.user.max_user_namespaces=0",
            ),
            (
                |guest| (guest.extras, guest.supervisor) = (true, true),
                "husk.log=warn husk.heartbeat_ms=10000 husk.extras=husk-extras husk.supervisor=1",
            ),
            (
                |guest| {
                    (guest.wall_clock, guest.ready_port) = (Some(Duration::from_nanos(1_000_000_007)), Some(65_540));
                },
                "husk.log=warn husk.heartbeat_ms=10000 husk.epoch_ns=1000000007 husk.ready_port=65540",
            ),
        ];
        for (change, expected) in table {
            let mut guest = guest();
            change(&mut guest);
            assert_eq!(kernel_cmdline(&guest, PLATFORM, Accel::Kvm, None), format!("{START} {expected}"));
        }
    }
}
