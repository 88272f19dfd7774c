//! QEMU's argument list, as a pure function of what the machine shall be.

use crate::vmm::{Accel, Board, Spec};

/// Frequency of QEMU's emulated APIC timer (hw/intc/apic.c counts nanoseconds), kHz.
const APIC_TIMER_KHZ: u64 = 1_000_000;

/// Numbers of the descriptors that QEMU inherits. It opens nothing by path but its own firmware, so it can run as a user who may
/// see none of husk's files, and no socket of it has a name.
#[derive(Debug, Clone)]
pub struct Fds {
    /// The kernel, readable.
    pub kernel: i32,
    /// The initramfs, readable.
    pub initrd: i32,
    /// The console's socket.
    pub console: i32,
    /// QMP's socket.
    pub qmp: i32,
    /// The vsock device's vhost-user socket, or the kernel's device.
    pub vsock: i32,
    /// virtiofsd's vhost-user socket.
    pub share: Option<i32>,
    /// The images of the disks, readable, in the spec's order.
    pub disks: Vec<i32>,
}

/// The arguments after the program's name.
pub fn arguments(spec: &Spec, fds: &Fds) -> Vec<String> {
    let mut args = Vec::with_capacity(48);
    let mut push = |words: &[&str]| args.extend(words.iter().map(|word| word.to_string()));

    // QEMU takes a comma in a value doubled.
    push(&["-name", &format!("{},debug-threads=on", spec.name.replace(',', ",,"))]);
    push(&["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
    push(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    push(&["-machine", &machine(spec)]);
    push(&["-accel", accel(spec.accel)]);
    if spec.accel == Accel::TcgCounted {
        push(&["-icount", "shift=0,sleep=off"]);
    }
    push(&["-cpu", cpu(spec.accel)]);
    push(&["-smp", &spec.vcpus.to_string()]);
    push(&["-m", &format!("{}M", spec.memory_mib)]);
    // vhost-user back ends map the guest's memory, so it has to be shareable.
    let pages = if spec.hugepages { ",hugetlb=on" } else { "" };
    push(&["-object", &format!("memory-backend-memfd,id=memory,size={}M,share=on{pages}", spec.memory_mib)]);
    push(&["-kernel", &format!("/dev/fd/{}", fds.kernel), "-initrd", &format!("/dev/fd/{}", fds.initrd)]);
    push(&["-append", &append(spec)]);
    push(&["-chardev", &format!("socket,id=console,fd={}", fds.console), "-serial", "chardev:console"]);
    push(&["-chardev", &format!("socket,id=qmp,fd={}", fds.qmp), "-mon", "chardev=qmp,mode=control"]);
    let bus = match spec.board {
        Board::Microvm => "device",
        Board::Q35 => "pci",
    };
    match spec.kernel_cid {
        None => {
            push(&["-chardev", &format!("socket,id=vsock,fd={}", fds.vsock)]);
            push(&["-device", &format!("vhost-user-vsock-{bus},chardev=vsock")]);
        }
        // Opened for it: who runs QEMU may not open it.
        Some(cid) => push(&["-device", &format!("vhost-vsock-{bus},guest-cid={cid},vhostfd={}", fds.vsock)]),
    }
    if let Some(share) = fds.share {
        push(&["-chardev", &format!("socket,id=share,fd={share}")]);
        push(&["-device", &format!("vhost-user-fs-{bus},chardev=share,tag={}", husk_protos::SHARE_TAG)]);
    }
    for (number, (disk, fd)) in spec.disks.iter().zip(&fds.disks).enumerate() {
        // Nobody else has it, so there is nobody to lock it against.
        let file = format!("driver=file,node-name=disk{number},filename=/dev/fd/{fd},read-only=on,locking=off");
        push(&["-blockdev", &file]);
        let serial = disk.serial.replace(',', ",,");
        push(&["-device", &format!("virtio-blk-{bus},drive=disk{number},serial={serial}")]);
    }
    args
}

fn machine(spec: &Spec) -> String {
    match spec.board {
        // acpi=off: with ACPI, under TCG, a tenth of the boots never see the first timer tick and hang. rtc=on: without it, the kernel waits
        // two seconds for a clock that is not there.
        Board::Microvm => {
            "microvm,acpi=off,rtc=on,isa-serial=on,auto-kernel-cmdline=on,memory-backend=memory".to_owned()
        }
        Board::Q35 => "q35,memory-backend=memory".to_owned(),
    }
}

fn accel(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg,thread=multi",
        Accel::TcgCounted => "tcg,thread=single",
    }
}

fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        // A processor that says that it copies strings fast is believed: the kernel then copies and clears by `rep movsb` and `rep stosb`,
        // which TCG emulates byte by byte. Without, it uses plain moves of words, which are several times as fast here.
        Accel::Tcg | Accel::TcgCounted => "max,-erms,-fsrm",
    }
}

/// What every guest's kernel is told (Documentation/admin-guide/kernel-parameters.txt).
///
/// reboot=t and panic=-1: with -no-reboot, both a shutdown and a panic end QEMU, and without ACPI a triple fault is the way.
/// no_timer_check: the kernel counts ticks of QEMU's timer against the host's time stamp counter; on a host under load they come so late
/// that it panics for want of a timer.
/// rcu_expedited: mounts and cgroups wait for grace periods, which otherwise take ticks of a guest that has nothing else to do.
/// noreplace-smp: a kernel with one processor otherwise takes its 7,700 lock prefixes out when it boots, one at a time, each between two
/// changes of the page tables: a tenth of a boot without KVM.
pub const KERNEL_PARAMETERS: [&str; 7] =
    ["console=ttyS0", "quiet", "reboot=t", "panic=-1", "no_timer_check", "rcupdate.rcu_expedited=1", "noreplace-smp"];

fn append(spec: &Spec) -> String {
    let mut words = KERNEL_PARAMETERS.map(String::from).to_vec();
    if spec.board == Board::Microvm {
        // There is neither, so the kernel need not look.
        words.extend(["acpi=off", "pci=off"].map(String::from));
    }
    if spec.accel != Accel::Kvm {
        // For PID 1 alone, which undoes it for all others: it is loaded where its workers are, and translated once for both.
        words.push("norandmaps".to_owned());
        // Ours: see kernel-config/patches.
        words.push("noreplace-returns".to_owned());
        // Ours too: without it, programs of the share are executed as what was in their pages before.
        words.push("virtiofs.rewrite_pages=1".to_owned());
    }
    // Under KVM, kvmclock and the TSC's deadline timer make this needless. Otherwise the guest's counter is the host's, or the instructions
    // counted, one a nanosecond.
    let tsc_khz = match spec.accel {
        Accel::Kvm => None,
        Accel::Tcg => spec.tsc_khz,
        Accel::TcgCounted => Some(1_000_000),
    };
    if let Some(khz) = tsc_khz {
        words.push(format!("tsc_early_khz={khz}"));
        // The host vouches for it: nothing here could, the other clocks are emulated.
        words.push("tsc=reliable".to_owned());
        words.push(format!("lapic_timer_khz={APIC_TIMER_KHZ}"));
    }
    words.extend(spec.kernel_params.iter().cloned());
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Disk;

    fn spec() -> Spec {
        Spec {
            name: "husk-a,b".into(),
            accel: Accel::Tcg,
            board: Board::Microvm,
            vcpus: 2,
            tsc_khz: None,
            memory_mib: 256,
            hugepages: false,
            kernel: "/k".into(),
            initrd: "/i".into(),
            kernel_cid: None,
            disks: Vec::new(),
            kernel_params: vec!["husk.log=warn".into()],
            user: None,
        }
    }

    const FDS: Fds =
        Fds { kernel: 10, initrd: 11, console: 12, qmp: 13, vsock: 14, share: Some(15), disks: Vec::new() };

    /// The value that follows each occurrence of `option`.
    fn values<'a>(args: &'a [String], option: &str) -> Vec<&'a str> {
        args.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn each_choice_has_its_arguments() {
        type Change = fn(&mut Spec);
        let table: &[(&str, Change, &str, &[&str])] = &[
            ("commas in names are doubled", |_| (), "-name", &["husk-a,,b,debug-threads=on"]),
            (
                "the guest's memory is shareable",
                |_| (),
                "-object",
                &["memory-backend-memfd,id=memory,size=256M,share=on"],
            ),
            (
                "or the host's huge pages",
                |spec| spec.hugepages = true,
                "-object",
                &["memory-backend-memfd,id=memory,size=256M,share=on,hugetlb=on"],
            ),
            ("files go by descriptor", |_| (), "-kernel", &["/dev/fd/10"]),
            (
                "microvm's devices",
                |_| (),
                "-device",
                &["vhost-user-vsock-device,chardev=vsock", "vhost-user-fs-device,chardev=share,tag=husk"],
            ),
            (
                "q35's devices",
                |spec| spec.board = Board::Q35,
                "-device",
                &["vhost-user-vsock-pci,chardev=vsock", "vhost-user-fs-pci,chardev=share,tag=husk"],
            ),
            (
                "the kernel's vsock",
                |spec| spec.kernel_cid = Some(4),
                "-device",
                &["vhost-vsock-device,guest-cid=4,vhostfd=14", "vhost-user-fs-device,chardev=share,tag=husk"],
            ),
            (
                "the kernel's vsock on q35",
                |spec| (spec.board, spec.kernel_cid) = (Board::Q35, Some(65535)),
                "-device",
                &["vhost-vsock-pci,guest-cid=65535,vhostfd=14", "vhost-user-fs-pci,chardev=share,tag=husk"],
            ),
            (
                "which has no socket",
                |spec| spec.kernel_cid = Some(4),
                "-chardev",
                &["socket,id=console,fd=12", "socket,id=qmp,fd=13", "socket,id=share,fd=15"],
            ),
            ("kvm", |spec| spec.accel = Accel::Kvm, "-cpu", &["host"]),
            ("tcg", |_| (), "-cpu", &["max,-erms,-fsrm"]),
            ("no instruction count", |_| (), "-icount", &[]),
            ("instruction count", |spec| spec.accel = Accel::TcgCounted, "-icount", &["shift=0,sleep=off"]),
            ("vcpus", |_| (), "-smp", &["2"]),
            (
                "the counter's frequency under software",
                |spec| spec.tsc_khz = Some(2_400_000),
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp acpi=off pci=off norandmaps noreplace-returns virtiofs.rewrite_pages=1 tsc_early_khz=2400000 tsc=reliable lapic_timer_khz=1000000 husk.log=warn",
                ],
            ),
            (
                "no frequency under hardware",
                |spec| (spec.accel, spec.tsc_khz) = (Accel::Kvm, Some(2_400_000)),
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp acpi=off pci=off husk.log=warn",
                ],
            ),
            (
                "q35's kernel looks for ACPI and PCI",
                |spec| spec.board = Board::Q35,
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp norandmaps noreplace-returns virtiofs.rewrite_pages=1 husk.log=warn",
                ],
            ),
            (
                "the kernel's parameters come last",
                |_| (),
                "-append",
                &[
                    "console=ttyS0 quiet reboot=t panic=-1 no_timer_check rcupdate.rcu_expedited=1 noreplace-smp acpi=off pci=off norandmaps noreplace-returns virtiofs.rewrite_pages=1 husk.log=warn",
                ],
            ),
        ];
        for (name, change, option, expected) in table {
            let mut spec = spec();
            change(&mut spec);
            assert_eq!(values(&arguments(&spec, &FDS), option), *expected, "{name}");
        }
    }

    #[test]
    fn a_machine_without_a_share_has_no_device_for_it() {
        let args = arguments(&spec(), &Fds { share: None, ..FDS });
        assert_eq!(values(&args, "-device"), ["vhost-user-vsock-device,chardev=vsock"]);
    }

    #[test]
    fn disks_go_by_descriptor_and_have_serials() {
        let image = std::sync::Arc::new(tempfile::tempfile().unwrap());
        let disk = |serial: &str| Disk { serial: serial.into(), image: image.clone() };
        let table = [(Board::Microvm, "virtio-blk-device"), (Board::Q35, "virtio-blk-pci")];
        for (board, device) in table {
            let spec = Spec { board, disks: vec![disk("one"), disk("t,wo")], ..spec() };
            let args = arguments(&spec, &Fds { disks: vec![16, 17], ..FDS });
            let file = |number, fd| {
                format!("driver=file,node-name=disk{number},filename=/dev/fd/{fd},read-only=on,locking=off")
            };
            assert_eq!(values(&args, "-blockdev"), [file(0, 16), file(1, 17)]);
            let expected = [format!("{device},drive=disk0,serial=one"), format!("{device},drive=disk1,serial=t,,wo")];
            assert_eq!(values(&args, "-device")[2..], expected);
        }
    }

    #[test]
    fn it_never_reboots_and_always_runs_in_the_sandbox() {
        let args = arguments(&spec(), &FDS);
        assert!(args.iter().any(|arg| arg == "-no-reboot"));
        assert_eq!(values(&args, "-sandbox").len(), 1);
    }
}
