//! QEMU's boards: what each is called, and what it is made of.

use crate::vmm::kernel_cmdline::Platform;

/// A board that the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// virtio-mmio, without ACPI and PCI.
    Microvm,
    /// virtio-pci, for devices that microvm lacks.
    Q35,
}

/// All boards, with their names in the configuration.
pub(crate) const NAMES: [(&str, Board); 2] = [("microvm", Board::Microvm), ("q35", Board::Q35)];

/// hw/intc/apic.c counts nanoseconds.
const APIC_TIMER_KHZ: u64 = 1_000_000;

impl Board {
    /// The name in the state.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Microvm => "Microvm",
            Self::Q35 => "Q35",
        }
    }

    /// The value of `-machine`.
    pub(super) fn machine(self) -> &'static str {
        match self {
            // acpi=off: with ACPI, under TCG, a tenth of the boots never get the first timer tick and hang. rtc=on:
            // without it, the kernel waits two seconds for a missing clock.
            Self::Microvm => {
                "microvm,acpi=off,rtc=on,isa-serial=on,auto-kernel-cmdline=on,memory-backend=memory,dump-guest-core=off"
            }
            Self::Q35 => "q35,memory-backend=memory,dump-guest-core=off",
        }
    }

    /// The suffix of the virtio devices for this board's bus.
    pub(super) fn bus(self) -> &'static str {
        match self {
            Self::Microvm => "device",
            Self::Q35 => "pci",
        }
    }

    /// Slots for virtio devices.
    pub(super) fn slots(self) -> usize {
        match self {
            // Without ACPI, and so without a second I/O APIC: hw/i386/microvm.c.
            Self::Microvm => 8,
            // Numbers 1 to 30 of the bus. The host bridge has 0 and the chipset 31: hw/i386/pc_q35.c.
            Self::Q35 => 30,
        }
    }

    /// Whether machines have virtual CPUs to spare unless the configuration says otherwise. Three of them add a fifth to
    /// the instructions of the kernel's boot on a microvm. On q35, seven add less than 2%.
    pub(crate) fn has_spare_vcpus(self) -> bool {
        self == Self::Q35
    }

    /// Whether the memory of a running machine can grow. microvm has no place for more.
    pub(crate) fn has_spare_memory(self) -> bool {
        self == Self::Q35
    }

    /// Network cards that a running machine can be given.
    pub(super) fn pluggable_nics(self) -> usize {
        match self {
            // QEMU cannot plug virtio-mmio devices.
            Self::Microvm => 0,
            // A limit of husk's: the bridge has 31 slots.
            Self::Q35 => 8,
        }
    }

    /// What the guest's kernel has to know.
    pub(super) fn platform(self) -> Platform {
        Platform { acpi_and_pci: self == Self::Q35, apic_timer_khz: APIC_TIMER_KHZ }
    }
}
