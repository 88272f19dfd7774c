//! Which parameters of the guest's kernel a configuration may give: those that tune a guest and cannot keep husk from booting it, from hearing of
//! its end, or from holding its limits. The names are from Documentation/admin-guide/kernel-parameters.txt.

/// May be given; `*` at the end stands for any continuation.
///
/// Left out besides husk's own: what names hardware that a VM has not, what only a module would read (the kernel has none), what belongs to
/// systemd or an initramfs of a distribution (the init is husk's), and what turns off a part that limits or statistics of containers need
/// (`cgroup_disable`, `psi`, `swapaccount`).
const ALLOWED: &[&str] = &[
    // What the kernel says, and how much of it.
    "quiet",
    "loglevel",
    "ignore_loglevel",
    "log_buf_len",
    "initcall_debug",
    "printk.*",
    // How it defends itself against the processor's leaks, and against its own mistakes.
    "mitigations",
    "nosmt",
    "pti",
    "nopti",
    "spectre_v2",
    "spec_store_bypass_disable",
    "retbleed",
    "init_on_alloc",
    "init_on_free",
    "slab_nomerge",
    "slub_debug",
    "randomize_kstack_offset",
    "oops",
    // Pages.
    "transparent_hugepage",
    "transparent_hugepage_shmem",
    "hugepages",
    "hugepagesz",
    "default_hugepagesz",
    // Where time and entropy come from.
    "clocksource",
    "random.trust_cpu",
    // What a sysctl sets, before anything runs.
    "sysctl.*",
    "ipv6.*",
    "workqueue.*",
];

/// Never given, because husk decides them: names, and why.
const OWN: &[(&[&str], &str)] = &[
    (&["husk.*"], "is husk's own word to its init"),
    (
        &["console", "earlycon", "earlyprintk", "keep_bootcon"],
        "would take the console away, which husk keeps in console.log",
    ),
    (&["panic", "reboot", "sysctl.kernel.panic"], "decides how a guest ends, which is how the host learns of it"),
    (
        &[
            "init",
            "rdinit",
            "root",
            "rootfstype",
            "rootflags",
            "rootdelay",
            "rootwait",
            "ro",
            "rw",
            "initrd",
            "noinitrd",
        ],
        "would start something else than husk's init",
    ),
    (
        &["mem", "memmap", "nr_cpus", "maxcpus", "possible_cpus", "nosmp", "numa"],
        "is the VM's size: use memory_mib, vcpus or profile",
    ),
    (
        &["acpi", "pci", "noapic", "nolapic", "virtio_mmio.*", "no_timer_check", "noreplace_smp", "noreplace_returns"],
        "describes the VM's machine: use machine",
    ),
    (
        &["tsc", "tsc_early_khz", "lapic_timer_khz", "norandmaps", "sysctl.kernel.randomize_va_space", "rcupdate.*"],
        "is set by husk, which boots fast by it",
    ),
];

/// Bytes of all together. The kernel cuts its command line off at 2048 bytes (COMMAND_LINE_SIZE), without a word, and at its end stand the devices of
/// a microvm; husk's own words and theirs take less than the other half.
const MOST_BYTES: usize = 1024;

/// Checks parameters as they shall stand in the command line.
///
/// # Errors
///
/// All that may not stand there, each with the reason.
pub(super) fn check(words: &[&str]) -> Result<Vec<String>, String> {
    let wrong: Vec<String> = words.iter().filter_map(|word| Some(format!("{word:?} {}", refusal(word)?))).collect();
    if !wrong.is_empty() {
        return Err(wrong.join(", "));
    }
    let length: usize = words.iter().map(|word| word.len() + 1).sum();
    if length > MOST_BYTES {
        return Err(format!("{length} bytes are too many: a kernel's command line has room for {MOST_BYTES}"));
    }
    Ok(words.iter().map(|word| (*word).to_owned()).collect())
}

/// Why a word may not be given, if it may not.
fn refusal(word: &str) -> Option<String> {
    // A quotation mark would let a value reach over the words behind it.
    if word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') {
        return Some("is not one kernel parameter".to_owned());
    }
    let name = word.split_once('=').map_or(word, |(name, _)| name);
    // As the kernel compares them: a dash is an underscore, and the parts of a sysctl may be put apart by slashes.
    let mut name = name.replace('-', "_");
    if name.starts_with("sysctl") {
        let parts: Vec<&str> = name.split(['.', '/']).filter(|part| !part.is_empty()).collect();
        name = parts.join(".");
    }
    let is = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(beginning) => name.strip_prefix(beginning).is_some_and(|rest| !rest.is_empty()),
        None => name == **pattern,
    };
    if let Some((_, why)) = OWN.iter().find(|(names, _)| names.iter().any(is)) {
        return Some((*why).to_owned());
    }
    if ALLOWED.iter().any(is) {
        return None;
    }
    Some(format!("is none of {}", ALLOWED.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tunes_a_guest_may_be_given_and_what_husk_decides_may_not() {
        let table = [
            ("loglevel=7", None),
            ("mitigations=off", None),
            ("transparent_hugepage=always", None),
            ("hugepages=16", None),
            ("init-on-alloc=1", None),
            ("nosmt", None),
            ("sysctl.vm.swappiness=7", None),
            ("sysctl/net/core/somaxconn=7", None),
            ("sysctl.=7", Some("is none of quiet loglevel")),
            ("console=ttyS1", Some("would take the console away")),
            ("panic=0", Some("decides how a guest ends")),
            ("sysctl.kernel.panic=0", Some("decides how a guest ends")),
            ("sysctl.kernel/panic=0", Some("decides how a guest ends")),
            ("sysctl/kernel.panic=0", Some("decides how a guest ends")),
            ("sysctl.kernel.//panic=0", Some("decides how a guest ends")),
            ("reboot=k", Some("decides how a guest ends")),
            ("init=/bin/sh", Some("would start something else")),
            ("rdinit=/bin/sh", Some("would start something else")),
            ("root=/dev/vda", Some("would start something else")),
            ("rw", Some("would start something else")),
            ("husk.log=trace", Some("is husk's own word")),
            ("mem=64M", Some("use memory_mib")),
            ("nr-cpus=1", Some("use memory_mib, vcpus or profile")),
            ("acpi=on", Some("use machine")),
            ("sysctl.kernel.randomize_va_space=0", Some("is set by husk")),
            ("tsc=unstable", Some("is set by husk")),
            ("cgroup_disable=memory", Some("is none of quiet loglevel")),
            ("systemd.unit=rescue.target", Some("is none of quiet loglevel")),
            ("loglevels=7", Some("is none of quiet loglevel")),
            ("--", Some("is none of quiet loglevel")),
            ("=1", Some("is none of quiet loglevel")),
            ("a b", Some("is not one kernel parameter")),
            ("", Some("is not one kernel parameter")),
            ("loglevel=\"7", Some("is not one kernel parameter")),
        ];
        for (word, expected) in table {
            match (refusal(word), expected) {
                (None, None) => {}
                (Some(why), Some(expected)) => assert!(why.contains(expected), "{word}: {why}"),
                (why, _) => panic!("{word}: {why:?}"),
            }
        }
    }

    #[test]
    fn all_that_are_refused_are_told() {
        let why = check(&["quiet", "panic=0", "foo"]).unwrap_err();
        assert!(
            why.starts_with("\"panic=0\" decides how a guest ends") && why.contains(", \"foo\" is none of"),
            "{why}"
        );
        assert_eq!(check(&["quiet", "loglevel=3"]).unwrap(), ["quiet", "loglevel=3"]);
    }

    #[test]
    fn what_the_machine_is_told_by_husk_is_none_of_what_may_be_given_but_for_its_silence() {
        let own = crate::vmm::kernel_cmdline::COMMON;
        let given: Vec<_> = own.iter().filter(|word| refusal(word).is_none()).collect();
        assert_eq!(given, [&"quiet"]);
    }

    #[test]
    fn they_leave_room_for_husks_own() {
        let long = format!("loglevel={}", "1".repeat(MOST_BYTES));
        assert_eq!(check(&[&long]).unwrap_err(), "1034 bytes are too many: a kernel's command line has room for 1024");
    }
}
