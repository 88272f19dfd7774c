//! Options of mounts. Every option of mount(8) and of the runtime spec is in a table here: the guest applies it, or it
//! has no effect on Linux, or it is rejected by name. Options that are in no table belong to the mount's filesystem.

use oci_spec::runtime::Mount;

use super::findings::Findings;

/// What becomes of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// The guest applies it.
    Applied,
    /// It has no effect on the filesystems that a guest can mount, under runc either.
    None,
    /// It sets a flag of a new filesystem, under the name that makes the guest's libcontainer pass it to the kernel. A
    /// bind mount shows a filesystem that exists already, so the flag has no effect there.
    Filesystem(&'static str),
    /// It clears a flag that a former option has set.
    Clears(&'static str),
    /// The guest applies it under another name.
    Renamed(&'static str),
    Rejected(&'static str),
}

use Effect::{Applied, Clears, Filesystem, Rejected, Renamed};

/// Options that do not depend on the filesystem, of mount(8) and of the runtime spec ("Linux mount options").
const OPTIONS: [(&str, Effect); 76] = [
    ("defaults", Applied),
    // Flags of the mount. The last one of a pair counts.
    ("ro", Applied),
    ("rw", Applied),
    ("suid", Applied),
    ("nosuid", Applied),
    ("dev", Applied),
    ("nodev", Applied),
    ("exec", Applied),
    ("noexec", Applied),
    ("atime", Applied),
    ("noatime", Applied),
    ("diratime", Applied),
    ("nodiratime", Applied),
    ("relatime", Applied),
    ("norelatime", Applied),
    ("strictatime", Applied),
    ("nostrictatime", Applied),
    ("symfollow", Clears("rnosymfollow")),
    ("nosymfollow", Renamed("rnosymfollow")),
    // The same, for everything below the mount too.
    ("rro", Applied),
    ("rrw", Applied),
    ("rsuid", Applied),
    ("rnosuid", Applied),
    ("rdev", Applied),
    ("rnodev", Applied),
    ("rexec", Applied),
    ("rnoexec", Applied),
    ("ratime", Applied),
    ("rnoatime", Applied),
    ("rdiratime", Applied),
    ("rnodiratime", Applied),
    ("rrelatime", Applied),
    ("rnorelatime", Applied),
    ("rstrictatime", Applied),
    ("rnostrictatime", Applied),
    ("rsymfollow", Applied),
    ("rnosymfollow", Applied),
    // Kind and propagation.
    ("bind", Applied),
    ("rbind", Applied),
    ("private", Applied),
    ("rprivate", Applied),
    ("shared", Applied),
    ("rshared", Applied),
    ("slave", Applied),
    ("rslave", Applied),
    ("unbindable", Applied),
    ("runbindable", Applied),
    // Flags of the filesystem. libcontainer drops the plain names of the first two.
    ("sync", Filesystem("sync=1")),
    ("async", Clears("sync=1")),
    ("dirsync", Filesystem("dirsync=1")),
    ("lazytime", Filesystem("lazytime")),
    ("nolazytime", Clears("lazytime")),
    // Extensions of the runtime spec.
    ("tmpcopyup", Applied),
    // With the mappings, the host or the guest applies these.
    ("idmap", Applied),
    ("ridmap", Applied),
    // Linux has no mandatory locks since 5.15; the others concern only filesystems on disks, or messages in the log.
    ("mand", Effect::None),
    ("nomand", Effect::None),
    ("iversion", Effect::None),
    ("noiversion", Effect::None),
    ("acl", Effect::None),
    ("noacl", Effect::None),
    ("silent", Effect::None),
    ("loud", Effect::None),
    ("remount", Rejected("a container's mounts are new, so there is nothing to mount again")),
    ("move", Rejected("a container's mounts are new, so there is nothing to move")),
    // mount(8) evaluates these itself, for /etc/fstab. The kernel rejects them, under runc too.
    ("auto", Rejected(FSTAB)),
    ("noauto", Rejected(FSTAB)),
    ("user", Rejected(FSTAB)),
    ("nouser", Rejected(FSTAB)),
    ("users", Rejected(FSTAB)),
    ("owner", Rejected(FSTAB)),
    ("group", Rejected(FSTAB)),
    ("nofail", Rejected(FSTAB)),
    ("_netdev", Rejected(FSTAB)),
    ("loop", Rejected("the VM has no loop devices")),
    ("offset", Rejected("the VM has no loop devices")),
];

const FSTAB: &str = "is an option for /etc/fstab, which the kernel does not know";

/// Options of SELinux, which the guest does not have. They are removed as other labels are.
const LABELS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// What the value of a filesystem's option has to be. The kernel's error would name neither option nor mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// There is no value.
    Absent,
    /// A number with a unit, or a part of the memory in percent (`memparse` in the kernel's lib/cmdline.c).
    Size,
    /// Octal.
    Mode,
    /// A number.
    Number,
    /// The kernel decides.
    Any,
}

/// Options of filesystems (Documentation/filesystems/tmpfs.rst and so on, without `source`). Options of filesystems that
/// are not listed are passed to the kernel.
const FILESYSTEMS: [(&str, &[(&str, Value)]); 7] = [
    (
        "tmpfs",
        &[
            ("size", Value::Size),
            ("nr_blocks", Value::Size),
            ("nr_inodes", Value::Size),
            ("mode", Value::Mode),
            ("uid", Value::Number),
            ("gid", Value::Number),
            ("huge", Value::Any),
            ("mpol", Value::Any),
            ("inode32", Value::Absent),
            ("inode64", Value::Absent),
            ("noswap", Value::Absent),
            ("quota", Value::Absent),
            ("usrquota", Value::Absent),
            ("grpquota", Value::Absent),
        ],
    ),
    ("ramfs", &[("mode", Value::Mode)]),
    ("proc", &[("hidepid", Value::Any), ("gid", Value::Number), ("subset", Value::Any)]),
    ("sysfs", &[]),
    ("mqueue", &[]),
    (
        "devpts",
        &[
            ("uid", Value::Number),
            ("gid", Value::Number),
            ("mode", Value::Mode),
            ("ptmxmode", Value::Mode),
            ("newinstance", Value::Absent),
            ("max", Value::Number),
        ],
    ),
    (
        "hugetlbfs",
        &[
            ("uid", Value::Number),
            ("gid", Value::Number),
            ("mode", Value::Mode),
            ("size", Value::Size),
            ("min_size", Value::Size),
            ("nr_inodes", Value::Size),
            ("pagesize", Value::Size),
        ],
    ),
];

impl Value {
    /// Why `value` is none, if it is none.
    fn problem(self, value: Option<&str>) -> Option<&'static str> {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let is_size = |text: &str| {
            let number = text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T', 'p', 'P', 'e', 'E', '%']);
            let number = number.unwrap_or(text);
            let hexadecimal = number.strip_prefix("0x").is_some_and(|hex| u64::from_str_radix(hex, 16).is_ok());
            digits(number) || hexadecimal
        };
        match (self, value) {
            (Self::Any, _) | (Self::Absent, None) => None,
            (Self::Absent, Some(_)) => Some("has no value"),
            (_, None) => Some("needs a value"),
            (Self::Size, Some(text)) => (!is_size(text)).then_some("is not a size"),
            (Self::Mode, Some(text)) => {
                (!u32::from_str_radix(text, 8).is_ok_and(|mode| mode <= 0o7777)).then_some("is not an octal mode")
            }
            (Self::Number, Some(text)) => text.parse::<u32>().is_err().then_some("is not a number"),
        }
    }
}

/// The options that a container's mounts may have, sorted.
pub(super) fn supported_options() -> Vec<&'static str> {
    let supported = |(name, effect): &(&'static str, Effect)| (!matches!(effect, Rejected(_))).then_some(*name);
    let mut names: Vec<_> = OPTIONS.iter().filter_map(supported).collect();
    names.sort_unstable();
    names
}

/// Rewrites the options of the spec's mount `index` for the guest.
pub(super) fn rewrite_options(index: usize, mount: &mut Mount, is_bind: bool, findings: &mut Findings) {
    let Some(options) = mount.options().clone() else { return };
    let field = format!("mounts[{index}].options");
    let mut rewritten: Vec<String> = Vec::with_capacity(options.len());
    for option in options {
        let name = option.split('=').next().unwrap_or_default();
        let effect = OPTIONS.iter().find(|(known, _)| *known == name).map(|(_, effect)| *effect);
        match effect {
            Some(Applied) if option == "tmpcopyup" && mount.typ().as_deref() != Some("tmpfs") => {
                findings.reject(&field, Some(&option), "applies to tmpfs only");
            }
            Some(Applied) => rewritten.push(option),
            Some(Renamed(other)) => rewritten.push(other.to_owned()),
            Some(Filesystem(other)) if !is_bind => rewritten.push(other.to_owned()),
            Some(Clears(other)) => rewritten.retain(|option| option != other),
            Some(Effect::None | Filesystem(_)) => {
                findings.note(format!("{field} {option:?}: removed, because it has no effect on this mount"));
            }
            Some(Rejected(why)) => findings.reject(&field, Some(&option), why),
            None if LABELS.contains(&name) => {
                findings.note(format!("{field} {option:?}: removed, the VM confines the container"));
            }
            None if option.is_empty() => {}
            None if is_bind => {
                let why = "is not an option of a bind mount; those of a filesystem do not apply to one that exists";
                findings.reject(&field, Some(&option), why);
            }
            None => match mount.typ().as_deref().and_then(|kind| options_of(kind).map(|known| (kind, known))) {
                Some((kind, known)) => match known.iter().find(|(known, _)| *known == name) {
                    Some((_, value)) => match value.problem(option.split_once('=').map(|(_, value)| value)) {
                        Some(why) => findings.reject(&field, Some(&option), why),
                        None => rewritten.push(option),
                    },
                    None => {
                        findings.reject(&field, Some(&option), format!("is neither a mount option nor one of {kind}"));
                    }
                },
                None => rewritten.push(option),
            },
        }
    }
    mount.set_options(Some(rewritten));
}

fn options_of(kind: &str) -> Option<&'static [(&'static str, Value)]> {
    FILESYSTEMS.iter().find(|(known, _)| *known == kind).map(|(_, options)| *options)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The options for the guest, or the first problem.
    fn run(kind: &str, options: &[&str]) -> (Result<serde_json::Value, String>, usize) {
        let mut mount: Mount =
            serde_json::from_value(json!({"destination": "/a", "type": kind, "options": options})).unwrap();
        let mut findings = Findings::default();
        rewrite_options(3, &mut mount, kind == "bind", &mut findings);
        let result = match findings.problems.first() {
            Some(problem) => Err(problem.to_string()),
            None => Ok(serde_json::to_value(mount.options()).unwrap()),
        };
        (result, findings.notes.len())
    }

    #[test]
    fn options_are_applied_renamed_or_removed() {
        let table: [(&str, &[&str], &[&str], usize); 11] = [
            (
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=64k"],
                &["nosuid", "strictatime", "mode=755", "size=64k"],
                0,
            ),
            ("tmpfs", &["sync", "dirsync", "lazytime"], &["sync=1", "dirsync=1", "lazytime"], 0),
            ("tmpfs", &["sync", "ro", "async", "lazytime", "nolazytime"], &["ro"], 0),
            ("tmpfs", &["mand", "silent", "iversion", "acl", "context=\"a:b\"", ""], &[], 5),
            ("tmpfs", &["nosymfollow", "tmpcopyup"], &["rnosymfollow", "tmpcopyup"], 0),
            ("tmpfs", &["nosymfollow", "symfollow"], &[], 0),
            ("bind", &["rbind", "ro", "rslave", "sync", "lazytime"], &["rbind", "ro", "rslave"], 2),
            ("devpts", &["newinstance", "ptmxmode=0666"], &["newinstance", "ptmxmode=0666"], 0),
            ("cgroup", &["ro", "anything=1"], &["ro", "anything=1"], 0),
            ("bind", &["bind", "idmap", "rnoatime"], &["bind", "idmap", "rnoatime"], 0),
            (
                "tmpfs",
                &["size=50%", "nr_inodes=1k", "size=0x1000", "mode=01777", "uid=0", "mpol=interleave", "noswap"],
                &["size=50%", "nr_inodes=1k", "size=0x1000", "mode=01777", "uid=0", "mpol=interleave", "noswap"],
                0,
            ),
        ];
        for (kind, given, expected, notes) in table {
            assert_eq!(run(kind, given), (Ok(json!(expected)), notes), "{kind} {given:?}");
        }
    }

    #[test]
    fn an_option_that_nothing_would_apply_is_rejected_by_name() {
        let table = [
            ("tmpfs", "frobnicate", r#"mounts[3].options "frobnicate": is neither a mount option nor one of tmpfs"#),
            ("tmpfs", "subset=pid", r#"mounts[3].options "subset=pid": is neither"#),
            ("sysfs", "mode=755", r#"mounts[3].options "mode=755": is neither"#),
            ("bind", "size=1m", r#"mounts[3].options "size=1m": is not an option of a bind mount"#),
            ("bind", "tmpcopyup", r#"mounts[3].options "tmpcopyup": applies to tmpfs only"#),
            ("tmpfs", "remount", r#"mounts[3].options "remount": a container's mounts are new"#),
            ("tmpfs", "nofail", r#"mounts[3].options "nofail": is an option for /etc/fstab"#),
            ("tmpfs", "size=abc", r#"mounts[3].options "size=abc": is not a size"#),
            ("tmpfs", "size=", r#"mounts[3].options "size=": is not a size"#),
            ("tmpfs", "size", r#"mounts[3].options "size": needs a value"#),
            ("tmpfs", "mode=rwx", r#"mounts[3].options "mode=rwx": is not an octal mode"#),
            ("tmpfs", "uid=root", r#"mounts[3].options "uid=root": is not a number"#),
            ("devpts", "newinstance=1", r#"mounts[3].options "newinstance=1": has no value"#),
            ("tmpfs", "x-systemd.automount", r#"mounts[3].options "x-systemd.automount": is neither"#),
        ];
        for (kind, option, expected) in table {
            let problem = run(kind, &["ro", option]).0.unwrap_err();
            assert!(problem.starts_with(expected), "{problem}");
        }
    }

    #[test]
    fn no_option_is_in_two_rows() {
        let mut names = OPTIONS.map(|(name, _)| name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}
