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
    // The guest rejects id-mapped mounts.
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

/// Options of filesystems (Documentation/filesystems/tmpfs.rst and so on, without `source`). Options of filesystems that
/// are not listed are passed to the kernel.
const FILESYSTEMS: [(&str, &[&str]); 7] = [
    (
        "tmpfs",
        &[
            "size",
            "nr_blocks",
            "nr_inodes",
            "mode",
            "uid",
            "gid",
            "huge",
            "mpol",
            "inode32",
            "inode64",
            "noswap",
            "quota",
            "usrquota",
            "grpquota",
        ],
    ),
    ("ramfs", &["mode"]),
    ("proc", &["hidepid", "gid", "subset"]),
    ("sysfs", &[]),
    ("mqueue", &[]),
    ("devpts", &["uid", "gid", "mode", "ptmxmode", "newinstance", "max"]),
    ("hugetlbfs", &["uid", "gid", "mode", "size", "min_size", "nr_inodes", "pagesize"]),
];

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
                Some((kind, known)) if !known.contains(&name) => {
                    findings.reject(&field, Some(&option), format!("is neither a mount option nor one of {kind}"));
                }
                _ => rewritten.push(option),
            },
        }
    }
    mount.set_options(Some(rewritten));
}

fn options_of(kind: &str) -> Option<&'static [&'static str]> {
    FILESYSTEMS.iter().find(|(known, _)| *known == kind).map(|(_, options)| *options)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The options for the guest, or the first problem.
    fn run(kind: &str, options: &[&str]) -> (Result<Value, String>, usize) {
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
        let table: [(&str, &[&str], &[&str], usize); 10] = [
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
