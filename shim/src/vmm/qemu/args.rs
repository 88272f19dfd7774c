//! QEMU's arguments, as a pure function of the machine's spec.

use husk_protos::mac::mac_text;

use super::board::Board;
use crate::network::user::{self, UserNetwork};
use crate::vmm::kernel_cmdline::kernel_cmdline;
use crate::vmm::machine::{Accel, Spec};

/// The bus of the network cards that are plugged into the running machine. QEMU plugs nothing into q35's own bus.
pub(super) const PLUG_BUS: &str = "plug";
/// The bridge's own hot-plug controller (SHPC) instead of ACPI's, which would describe each slot in a table that the
/// guest interprets when it boots: 4.3 million instructions instead of 0.1 million. The guest uses neither: its init
/// searches the bus.
const BRIDGE_CONTROLS_ITSELF: &str = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off";

/// The memory that the running machine can be given, and the device that offers it to the guest.
pub(super) const GROWTH: &str = "growth";

/// The controller of the disks that the running machine is given. Without virtio's events (hotplug=off), because the
/// guest's init asks for each disk. One queue: one thread of QEMU serves all.
const DISKS: &str = "id=disks,hotplug=off,num_queues=1";

/// How much translated code QEMU keeps unless it is configured, in MiB: a quarter of the VM's memory, within these limits.
/// gcc and Python together need the least.
const CODE_CACHE_MIB: std::ops::RangeInclusive<u64> = 128..=1024;

/// The device through which the guest gives memory back.
pub(super) const BALLOON: &str = "balloon";
/// The vsock device and the share.
pub(super) const OTHER_DEVICES: usize = 2;

/// Numbers of the descriptors that QEMU inherits. QEMU opens only its own firmware by path, so its user needs no access
/// to husk's files, and none of its sockets has a name.
#[derive(Debug, Clone)]
pub(crate) struct Fds {
    /// The kernel, readable.
    pub(crate) kernel: i32,
    /// The initramfs, readable.
    pub(crate) initrd: i32,
    /// The console's socket.
    pub(crate) console: i32,
    /// The socket of the debug shell's console.
    pub(crate) shell: Option<i32>,
    /// QMP's socket.
    pub(crate) qmp: i32,
    /// The vsock device's vhost-user socket, or the kernel's vsock device.
    pub(crate) vsock: i32,
    /// virtiofsd's vhost-user socket.
    pub(crate) share: Option<i32>,
    /// The disks' images, readable, in the spec's order.
    pub(crate) disks: Vec<i32>,
    /// The network cards.
    pub(crate) nics: Vec<NicFds>,
}

/// A network card's address and descriptors.
#[derive(Debug, Clone)]
pub(crate) struct NicFds {
    pub(crate) mac: [u8; 6],
    /// The tap's, one for each pair of queues.
    pub(crate) taps: Vec<i32>,
    /// The kernel's vhost-net device, as often as there are taps; empty if QEMU itself moves the packets.
    pub(crate) vhost: Vec<i32>,
}

/// QEMU rejects commands that are not stable. They change with its version: one ends the machine in QEMU 11.1.
const STABLE: [&str; 2] = ["-compat", "unstable-input=reject"];

/// The arguments after the program's name.
pub(crate) fn arguments(spec: &Spec, board: Board, fds: &Fds) -> Vec<String> {
    let mut args = Vec::with_capacity(48);
    let mut push = |words: &[&str]| args.extend(words.iter().map(|word| word.to_string()));

    // QEMU reads a doubled comma in a value as one comma.
    push(&["-name", &format!("{},debug-threads=on", spec.name.replace(',', ",,"))]);
    push(&["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
    push(&STABLE);
    push(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    push(&["-machine", board.machine()]);
    push(&["-accel", &accel(spec)]);
    if spec.accel == Accel::TcgCounted {
        push(&["-icount", "shift=0,sleep=off"]);
    }
    push(&["-cpu", cpu(spec.accel)]);
    push(&["-smp", &spec.max_vcpus.to_string()]);
    let growth = growth_mib(spec);
    let most = if growth > 0 { format!(",maxmem={}M", spec.max_memory_mib) } else { String::new() };
    push(&["-m", &format!("{}M{most}", spec.memory_mib)]);
    // vhost-user back ends map the guest's memory.
    let pages = if spec.hugepages { ",hugetlb=on" } else { "" };
    push(&["-object", &format!("memory-backend-memfd,id=memory,size={}M,share=on{pages}", spec.memory_mib)]);
    push(&["-kernel", &format!("/dev/fd/{}", fds.kernel), "-initrd", &format!("/dev/fd/{}", fds.initrd)]);
    push(&["-append", &kernel_cmdline(&spec.guest, board.platform(), spec.accel, spec.tsc_khz)]);
    push(&["-chardev", &format!("socket,id=console,fd={}", fds.console), "-serial", "chardev:console"]);
    push(&["-chardev", &format!("socket,id=qmp,fd={}", fds.qmp), "-mon", "chardev=qmp,mode=control"]);
    let bus = board.bus();
    match spec.kernel_cid {
        None => {
            push(&["-chardev", &format!("socket,id=vsock,fd={}", fds.vsock)]);
            push(&["-device", &format!("vhost-user-vsock-{bus},chardev=vsock")]);
        }
        // By descriptor: QEMU's user may not open the device.
        Some(cid) => push(&["-device", &format!("vhost-vsock-{bus},guest-cid={cid},vhostfd={}", fds.vsock)]),
    }
    if let Some(share) = fds.share {
        push(&["-chardev", &format!("socket,id=share,fd={share}")]);
        push(&["-device", &format!("vhost-user-fs-{bus},chardev=share,tag={}", husk_protos::SHARE_TAG)]);
    }
    if let Some(shell) = fds.shell {
        // /dev/hvc0 in the guest.
        push(&["-chardev", &format!("socket,id=shell,fd={shell}")]);
        push(&["-device", &format!("virtio-serial-{bus},max_ports=1"), "-device", "virtconsole,chardev=shell"]);
    }
    for (number, (disk, fd)) in spec.disks.iter().zip(&fds.disks).enumerate() {
        // No lock: no other process has the image.
        let file = format!("driver=file,node-name=disk{number},filename=/dev/fd/{fd},read-only=on,locking=off");
        push(&["-blockdev", &file]);
        let serial = disk.serial.replace(',', ",,");
        push(&["-device", &format!("virtio-blk-{bus},drive=disk{number},serial={serial}")]);
    }
    for (number, nic) in fds.nics.iter().enumerate() {
        push(&["-netdev", &netdev(number, nic)]);
        let queues = if nic.taps.len() > 1 { ",mq=on" } else { "" };
        push(&["-device", &nic_device(&format!("net{number}"), nic.mac, queues, board)]);
    }
    if let Some(network) = &spec.user_network {
        push(&["-netdev", &user_netdev(network)]);
        push(&["-device", &nic_device("user", user::MAC, "", board)]);
    }
    if growth > 0 {
        push(&["-object", &format!("memory-backend-memfd,id={GROWTH},size={growth}M,share=on")]);
        // The whole range is one region from the start: no back end has to learn of it while the machine runs.
        push(&["-device", &format!("virtio-mem-{bus},id={GROWTH},memdev={GROWTH}")]);
    }
    if spec.guest.disks {
        push(&["-device", &format!("virtio-scsi-{bus},{DISKS}")]);
    }
    if has_balloon(spec, board, fds.nics.len()) {
        // The guest takes its memory back when it runs short, so that no target can make it kill programs.
        let options = "free-page-reporting=on,deflate-on-oom=on";
        push(&["-device", &format!("virtio-balloon-{bus},id={BALLOON},{options}")]);
    }
    if spec.pluggable_nics > 0 {
        push(&["-global", BRIDGE_CONTROLS_ITSELF]);
        // Last, so that the other devices keep their places.
        push(&["-device", &format!("pci-bridge,id={PLUG_BUS},chassis_nr=1,shpc=on")]);
    }
    args
}

/// Whether the machine has a balloon: not if its network cards have taken the last slot. Huge pages stay with the VM.
pub(super) fn has_balloon(spec: &Spec, board: Board, nics: usize) -> bool {
    let nics = nics + usize::from(spec.user_network.is_some());
    !spec.hugepages && slots_taken(spec) + nics < board.slots()
}

/// The slots that the devices other than network cards and the balloon take.
pub(super) fn slots_taken(spec: &Spec) -> usize {
    let shell = usize::from(spec.guest.debug);
    let bridge = usize::from(spec.pluggable_nics > 0);
    let growth = usize::from(growth_mib(spec) > 0);
    let controller = usize::from(spec.guest.disks);
    OTHER_DEVICES + shell + bridge + growth + controller + spec.disks.len()
}

/// The memory that the running machine can be given, MiB.
pub(super) fn growth_mib(spec: &Spec) -> u64 {
    spec.max_memory_mib.saturating_sub(spec.memory_mib)
}

fn netdev(number: usize, nic: &NicFds) -> String {
    let list = |fds: &[i32]| fds.iter().map(i32::to_string).collect::<Vec<_>>().join(":");
    let vhost = match nic.vhost.as_slice() {
        [] => "vhost=off".to_owned(),
        fds => format!("vhost=on,vhostfds={}", list(fds)),
    };
    format!("tap,id=net{number},fds={},{vhost}", list(&nic.taps))
}

/// QEMU's own TCP/IP stack (libslirp). It offers neither files nor programs of the host: those need options of their
/// own.
fn user_netdev(network: &UserNetwork) -> String {
    use user::{DNS, DNS6, GATEWAY, GATEWAY6, GUEST, GUEST6, PREFIX, PREFIX6};
    let mask = |address: std::net::Ipv4Addr| std::net::Ipv4Addr::from(u32::from(address) & !(u32::MAX >> PREFIX));
    let mask6 = |address: std::net::Ipv6Addr| std::net::Ipv6Addr::from(u128::from(address) & !(u128::MAX >> PREFIX6));
    let mut netdev = format!(
        "user,id=user,ipv4=on,net={}/{PREFIX},host={GATEWAY},dns={DNS},dhcpstart={GUEST},\
         ipv6=on,ipv6-prefix={},ipv6-prefixlen={PREFIX6},ipv6-host={GATEWAY6},ipv6-dns={DNS6}",
        mask(GUEST),
        mask6(GUEST6),
    );
    for mapping in &network.ports {
        let user::HostPort { protocol, address, port } = mapping.host;
        netdev.push_str(&format!(",hostfwd={}:{address}:{port}-{GUEST}:{}", protocol.name(), mapping.guest));
    }
    netdev
}

fn nic_device(netdev: &str, mac: [u8; 6], queues: &str, board: Board) -> String {
    let mac = mac_text(&mac);
    // Without an option ROM, which would only serve to boot over the network.
    let rom = if board == Board::Q35 { ",romfile=" } else { "" };
    format!("virtio-net-{},netdev={netdev},mac={mac}{queues}{rom}", board.bus())
}

/// How much translated code QEMU keeps, MiB; none with hardware virtualization. QEMU's default is 1 GiB. The code of
/// programs that have exited stays until the cache is full, so a pod whose containers restart reaches the limit, whatever
/// its programs need. A full cache is emptied, and the code that runs then is translated again.
pub(super) fn code_cache_mib(spec: &Spec) -> u64 {
    match spec.accel {
        Accel::Kvm => 0,
        Accel::Tcg | Accel::TcgCounted => {
            let share = (spec.memory_mib / 4).clamp(*CODE_CACHE_MIB.start(), *CODE_CACHE_MIB.end());
            spec.code_cache_mib.unwrap_or(share)
        }
    }
}

fn accel(spec: &Spec) -> String {
    let cache = code_cache_mib(spec);
    match spec.accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg => format!("tcg,thread=multi,tb-size={cache}"),
        Accel::TcgCounted => format!("tcg,thread=single,tb-size={cache}"),
    }
}

fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        // With these flags, the kernel copies and clears memory with `rep movsb` and `rep stosb`, which TCG emulates
        // byte by byte. Without them, it moves words, which is several times as fast under TCG.
        Accel::Tcg | Accel::TcgCounted => "max,-erms,-fsrm",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::vmm::kernel_cmdline::tests::guest;
    use crate::vmm::machine::{Disk, GuestParams};

    fn spec() -> Spec {
        Spec {
            name: "husk-a,b".into(),
            accel: Accel::Tcg,
            vcpus: 2,
            max_vcpus: 2,
            tsc_khz: None,
            memory_mib: 256,
            max_memory_mib: 256,
            hugepages: false,
            code_cache_mib: None,
            kernel: "/k".into(),
            initrd: "/i".into(),
            kernel_sha256: None,
            initrd_sha256: None,
            kernel_cid: None,
            disks: Vec::new(),
            pluggable_nics: 0,
            user_network: None,
            guest: guest(),
            user: None,
        }
    }

    pub(crate) const FDS: Fds = Fds {
        kernel: 10,
        initrd: 11,
        console: 12,
        shell: None,
        qmp: 13,
        vsock: 14,
        share: Some(15),
        disks: Vec::new(),
        nics: Vec::new(),
    };

    /// The value that follows each occurrence of `option`. Without the balloon, which has a test of its own.
    fn values<'a>(args: &'a [String], option: &str) -> Vec<&'a str> {
        let values = args.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str());
        values.filter(|value| !value.starts_with("virtio-balloon")).collect()
    }

    #[test]
    fn a_machine_has_a_balloon_if_its_memory_can_be_given_back_and_a_slot_is_free() {
        let nic = NicFds { mac: [2; 6], taps: vec![20], vhost: Vec::new() };
        for (board, nics, hugepages, expected) in [
            (Board::Microvm, 0, false, Some("virtio-balloon-device")),
            (Board::Microvm, 5, false, Some("virtio-balloon-device")),
            (Board::Microvm, 6, false, None),
            (Board::Microvm, 0, true, None),
            (Board::Q35, 6, false, Some("virtio-balloon-pci")),
            (Board::Q35, 0, true, None),
        ] {
            let fds = Fds { nics: vec![nic.clone(); nics], ..FDS };
            let args = arguments(&Spec { hugepages, ..spec() }, board, &fds);
            let found: Vec<&String> = args.iter().filter(|arg| arg.starts_with("virtio-balloon")).collect();
            let options = ",id=balloon,free-page-reporting=on,deflate-on-oom=on";
            let expected: Vec<String> = expected.iter().map(|device| format!("{device}{options}")).collect();
            assert_eq!(found, expected.iter().collect::<Vec<_>>(), "{board:?} {nics} {hugepages}");
        }
    }

    #[test]
    fn the_code_that_tcg_keeps_is_bounded() {
        for (accel, memory_mib, code_cache_mib, expected) in [
            (Accel::Tcg, 128, None, "tcg,thread=multi,tb-size=128"),
            (Accel::Tcg, 1024, None, "tcg,thread=multi,tb-size=256"),
            (Accel::Tcg, 1 << 20, None, "tcg,thread=multi,tb-size=1024"),
            (Accel::Tcg, 1 << 20, Some(48), "tcg,thread=multi,tb-size=48"),
            (Accel::TcgCounted, 512, None, "tcg,thread=single,tb-size=128"),
            (Accel::Kvm, 512, Some(48), "kvm"),
        ] {
            let spec = Spec { accel, memory_mib, max_memory_mib: memory_mib, code_cache_mib, ..spec() };
            let args = arguments(&spec, Board::Microvm, &FDS);
            assert_eq!(values(&args, "-accel"), [expected], "{accel:?} with {memory_mib} MiB");
        }
    }

    #[test]
    fn each_choice_has_its_arguments() {
        type Change = fn(&mut Spec, &mut Board);
        let table: &[(&str, Change, &str, &[&str])] = &[
            ("commas in names are doubled", |_, _| (), "-name", &["husk-a,,b,debug-threads=on"]),
            (
                "the guest's memory is shareable",
                |_, _| (),
                "-object",
                &["memory-backend-memfd,id=memory,size=256M,share=on"],
            ),
            (
                "on the host's huge pages if asked",
                |spec, _| spec.hugepages = true,
                "-object",
                &["memory-backend-memfd,id=memory,size=256M,share=on,hugetlb=on"],
            ),
            ("files are passed by descriptor", |_, _| (), "-kernel", &["/dev/fd/10"]),
            (
                "microvm's devices",
                |_, _| (),
                "-device",
                &["vhost-user-vsock-device,chardev=vsock", "vhost-user-fs-device,chardev=share,tag=husk"],
            ),
            (
                "q35's devices",
                |_, board| *board = Board::Q35,
                "-device",
                &["vhost-user-vsock-pci,chardev=vsock", "vhost-user-fs-pci,chardev=share,tag=husk"],
            ),
            (
                "the kernel's vsock",
                |spec, _| spec.kernel_cid = Some(4),
                "-device",
                &["vhost-vsock-device,guest-cid=4,vhostfd=14", "vhost-user-fs-device,chardev=share,tag=husk"],
            ),
            (
                "the kernel's vsock on q35",
                |spec, board| (*board, spec.kernel_cid) = (Board::Q35, Some(65535)),
                "-device",
                &["vhost-vsock-pci,guest-cid=65535,vhostfd=14", "vhost-user-fs-pci,chardev=share,tag=husk"],
            ),
            (
                "the kernel's vsock has no socket",
                |spec, _| spec.kernel_cid = Some(4),
                "-chardev",
                &["socket,id=console,fd=12", "socket,id=qmp,fd=13", "socket,id=share,fd=15"],
            ),
            ("kvm", |spec, _| spec.accel = Accel::Kvm, "-cpu", &["host"]),
            ("tcg", |_, _| (), "-cpu", &["max,-erms,-fsrm"]),
            ("no instruction count", |_, _| (), "-icount", &[]),
            ("instruction count", |spec, _| spec.accel = Accel::TcgCounted, "-icount", &["shift=0,sleep=off"]),
            ("vcpus", |_, _| (), "-smp", &["2"]),
            ("spare vcpus", |spec, _| spec.max_vcpus = 5, "-smp", &["5"]),
            (
                "the kernel's command line",
                |spec, _| (spec.accel, spec.tsc_khz) = (Accel::Tcg, Some(2_400_000)),
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp acpi=off pci=off norandmaps randmaps_once noreplace-returns init_on_alloc=0 virtiofs.rewrite_pages=1 tsc_early_khz=2400000 tsc=reliable lapic_timer_khz=1000000 husk.log=warn husk.heartbeat_ms=10000",
                ],
            ),
            (
                "q35's kernel searches for ACPI and PCI",
                |spec, board| (spec.accel, *board) = (Accel::Kvm, Board::Q35),
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp husk.log=warn husk.heartbeat_ms=10000",
                ],
            ),
        ];
        for (name, change, option, expected) in table {
            let (mut spec, mut board) = (spec(), Board::Microvm);
            change(&mut spec, &mut board);
            assert_eq!(values(&arguments(&spec, board, &FDS), option), *expected, "{name}");
        }
    }

    #[test]
    fn a_machine_whose_memory_can_grow_has_the_range_from_the_start_and_offers_none_of_it() {
        let args = arguments(&Spec { max_memory_mib: 1024, ..spec() }, Board::Q35, &FDS);
        assert_eq!(values(&args, "-m"), ["256M,maxmem=1024M"]);
        assert_eq!(values(&args, "-object")[1..], ["memory-backend-memfd,id=growth,size=768M,share=on"]);
        assert_eq!(values(&args, "-device").last(), Some(&"virtio-mem-pci,id=growth,memdev=growth"));
    }

    #[test]
    fn a_machine_without_a_share_has_no_virtiofs_device() {
        let args = arguments(&spec(), Board::Microvm, &Fds { share: None, ..FDS });
        assert_eq!(values(&args, "-device"), ["vhost-user-vsock-device,chardev=vsock"]);
    }

    #[test]
    fn a_debug_shell_has_a_console_of_its_own() {
        for (board, device) in [(Board::Microvm, "virtio-serial-device"), (Board::Q35, "virtio-serial-pci")] {
            let args = arguments(&spec(), board, &Fds { shell: Some(16), ..FDS });
            let expected = [format!("{device},max_ports=1"), "virtconsole,chardev=shell".to_owned()];
            assert_eq!(values(&args, "-device")[2..], expected);
            assert!(values(&args, "-chardev").contains(&"socket,id=shell,fd=16"), "{args:?}");
        }
    }

    #[test]
    fn disks_are_passed_by_descriptor_and_have_serials() {
        let image = std::sync::Arc::new(tempfile::tempfile().unwrap());
        let disk = |serial: &str| Disk { serial: serial.into(), image: image.clone() };
        let table = [(Board::Microvm, "virtio-blk-device"), (Board::Q35, "virtio-blk-pci")];
        for (board, device) in table {
            let spec = Spec { disks: vec![disk("one"), disk("t,wo")], ..spec() };
            let args = arguments(&spec, board, &Fds { disks: vec![16, 17], ..FDS });
            let file = |number, fd| {
                format!("driver=file,node-name=disk{number},filename=/dev/fd/{fd},read-only=on,locking=off")
            };
            assert_eq!(values(&args, "-blockdev"), [file(0, 16), file(1, 17)]);
            let expected = [format!("{device},drive=disk0,serial=one"), format!("{device},drive=disk1,serial=t,,wo")];
            assert_eq!(values(&args, "-device")[2..], expected);
        }
    }

    #[test]
    fn a_nic_has_the_links_address_and_a_descriptor_per_queue_pair() {
        let mac = [2, 0, 0, 0, 0, 0xab];
        let nic = |taps: &[i32], vhost: &[i32]| NicFds { mac, taps: taps.to_vec(), vhost: vhost.to_vec() };
        let table = [
            (
                Board::Microvm,
                nic(&[20], &[]),
                ["tap,id=net0,fds=20,vhost=off", "virtio-net-device,netdev=net0,mac=02:00:00:00:00:ab"],
            ),
            (
                Board::Q35,
                nic(&[20, 21], &[22, 23]),
                [
                    "tap,id=net0,fds=20:21,vhost=on,vhostfds=22:23",
                    "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:ab,mq=on,romfile=",
                ],
            ),
        ];
        for (board, nic, expected) in table {
            let args = arguments(&spec(), board, &Fds { nics: vec![nic], ..FDS });
            let of = |option: &str| {
                let values = args.iter().zip(&args[1..]).filter(move |(name, _)| *name == option);
                values.map(|(_, value)| value.as_str()).collect::<Vec<_>>()
            };
            assert!(of("-netdev").contains(&expected[0]), "{args:?}");
            assert!(of("-device").contains(&expected[1]), "{args:?}");
        }
    }

    #[test]
    fn a_machine_that_may_be_given_network_cards_has_a_bridge_after_all_other_devices() {
        let spec = Spec { pluggable_nics: 8, ..spec() };
        let args = arguments(&spec, Board::Q35, &FDS);
        assert_eq!(values(&args, "-device").last(), Some(&"pci-bridge,id=plug,chassis_nr=1,shpc=on"));
        assert_eq!(values(&args, "-global"), ["ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);
    }

    #[test]
    fn a_machine_that_may_be_given_disks_has_a_controller_for_them() {
        for (board, device) in [(Board::Microvm, "virtio-scsi-device"), (Board::Q35, "virtio-scsi-pci")] {
            let guest = GuestParams { disks: true, ..guest() };
            let args = arguments(&Spec { guest, ..spec() }, board, &FDS);
            let expected = format!("{device},id=disks,hotplug=off,num_queues=1");
            assert_eq!(values(&args, "-device").last(), Some(&expected.as_str()));
        }
    }

    #[test]
    fn user_mode_has_a_card_and_its_ports() {
        let port = |protocol, address: &str, port, guest| user::PortMapping {
            host: user::HostPort { protocol, address: address.parse().unwrap(), port },
            guest,
        };
        let ports =
            vec![port(user::Protocol::Tcp, "127.0.0.1", 18080, 80), port(user::Protocol::Udp, "0.0.0.0", 5353, 53)];
        let spec = Spec { user_network: Some(UserNetwork { ports }), ..spec() };
        let args = arguments(&spec, Board::Q35, &FDS);
        let network = "user,id=user,ipv4=on,net=10.0.2.0/24,host=10.0.2.2,dns=10.0.2.3,dhcpstart=10.0.2.15,\
                       ipv6=on,ipv6-prefix=fec0::,ipv6-prefixlen=64,ipv6-host=fec0::2,ipv6-dns=fec0::3,\
                       hostfwd=tcp:127.0.0.1:18080-10.0.2.15:80,hostfwd=udp:0.0.0.0:5353-10.0.2.15:53";
        assert_eq!(values(&args, "-netdev"), [network]);
        let card = "virtio-net-pci,netdev=user,mac=02:68:75:73:6b:01,romfile=";
        assert_eq!(values(&args, "-device").last(), Some(&card));
        assert_eq!(values(&arguments(&self::spec(), Board::Q35, &FDS), "-netdev"), [""; 0]);
    }

    #[test]
    fn qemu_never_reboots_and_always_runs_with_its_seccomp_sandbox_and_stable_commands() {
        let args = arguments(&spec(), Board::Microvm, &FDS);
        assert_eq!(values(&args, "-compat"), ["unstable-input=reject"]);
        assert!(args.iter().any(|arg| arg == "-no-reboot"));
        assert_eq!(values(&args, "-sandbox").len(), 1);
    }
}
