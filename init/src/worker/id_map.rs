//! ID-mapped mounts of disks. libcontainer does not know them, so the worker makes them, and libcontainer binds them. The
//! host maps those of its own folders and files.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use husk_protos::DISKS_PATH;
use husk_protos::chain::Chain;
use libcontainer::syscall::linux::{AT_EMPTY_PATH, AT_RECURSIVE, MountAttr};
use libcontainer::syscall::syscall::create_syscall;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe, read};
use oci_spec::runtime::{LinuxIdMapping, Mount};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::stage::Stage;
use super::user_namespace::line;
use crate::error::{CallError, FailureKind};

/// linux/mount.h.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
/// The options of ID-mapped mounts.
const OPTIONS: [&str; 2] = ["idmap", "ridmap"];

/// Why a mount cannot be ID-mapped here, if it is to be.
pub(super) fn problem(mount: &Mount) -> Option<String> {
    let by_option = mount.options().iter().flatten().any(|option| OPTIONS.contains(&option.as_str()));
    if !by_option && mount.uid_mappings().is_none() && mount.gid_mappings().is_none() {
        return None;
    }
    let destination = mount.destination().display();
    let on_disk = mount.source().as_ref().is_some_and(|source| source.starts_with(DISKS_PATH));
    if !on_disk {
        return Some(format!("mounts: {destination} cannot be ID-mapped: it is not on a disk"));
    }
    let mapped = |mappings: &Option<Vec<LinuxIdMapping>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    let complete = mapped(mount.uid_mappings()) && mapped(mount.gid_mappings());
    (!complete).then(|| format!("mounts: {destination} cannot be ID-mapped: it lacks uidMappings or gidMappings"))
}

/// Makes the ID-mapped mounts. Returns whether there are any.
///
/// # Errors
/// That of the first mount that fails.
pub(super) fn apply(mounts: &mut [Mount], stage: &mut Stage) -> Result<bool, CallError> {
    let mut changed = false;
    for (index, mount) in mounts.iter_mut().enumerate().filter(|(_, mount)| mount.uid_mappings().is_some()) {
        let mapped = map(index, mount, stage);
        mapped.map_err(|error| {
            let what = format!("mounts[{index}] {}: map its IDs: {}", mount.destination().display(), Chain(&*error));
            CallError::new(FailureKind::Internal, what)
        })?;
        changed = true;
    }
    Ok(changed)
}

fn map(index: usize, mount: &mut Mount, stage: &mut Stage) -> Result<(), Box<dyn std::error::Error>> {
    let mut options = mount.options().clone().unwrap_or_default();
    let taken: Vec<String> = options.extract_if(.., |option| OPTIONS.contains(&option.as_str())).collect();
    let depth = if taken.last().is_some_and(|last| last == "ridmap") { AT_RECURSIVE } else { 0 };
    let source = mount.source().clone().unwrap_or_default();
    let target = stage.mount_point(index)?;
    let list = |mappings: &Option<Vec<LinuxIdMapping>>| mappings.clone().unwrap_or_default();
    let namespace = user_namespace(&list(mount.uid_mappings()), &list(mount.gid_mappings()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, &source, flags)?;
    let userns_fd = namespace.as_raw_fd() as u64;
    let attributes = MountAttr { attr_set: MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    let size = size_of::<MountAttr>();
    create_syscall().mount_setattr(tree.as_fd(), Path::new(""), AT_EMPTY_PATH | depth, &attributes, size)?;
    move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    mount.set_source(Some(target)).set_options(Some(options)).set_uid_mappings(None).set_gid_mappings(None);
    Ok(())
}

/// A user namespace with these mappings, by which the kernel takes those of a mount (mount_setattr(2)). Only a process can
/// create one.
fn user_namespace(users: &[LinuxIdMapping], groups: &[LinuxIdMapping]) -> io::Result<File> {
    let (created, in_child) = pipe()?;
    let (of_child, done) = pipe()?;
    // SAFETY: the worker has one thread, so the child may do what it likes.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop((created, done));
            hold(&in_child, &of_child)
        }
        ForkResult::Parent { child } => {
            drop((in_child, of_child));
            let made = wait_for(&created).and_then(|()| {
                let process = Path::new("/proc").join(child.to_string());
                for (file, mappings) in [("uid_map", users), ("gid_map", groups)] {
                    let lines = mappings.iter().map(|one| line(one.container_id(), one.host_id(), one.size()));
                    fs::write(process.join(file), lines.collect::<String>())?;
                }
                File::open(process.join("ns/user"))
            });
            // The child ends.
            drop(done);
            waitpid(child, None)?;
            made
        }
    }
}

/// In the child: creates the namespace, and exists until the parent has opened it.
fn hold(created: &OwnedFd, done: &OwnedFd) -> ! {
    let status = match unshare(CloneFlags::CLONE_NEWUSER).and_then(|()| nix::unistd::write(created, &[0])) {
        // Returns when the parent closes its end.
        Ok(_) => read(done, &mut [0]).map_or(1, |_| 0),
        Err(error) => error as i32,
    };
    // SAFETY: ends the process without running what is the parent's.
    unsafe { libc::_exit(status) }
}

/// Waits for the child's namespace.
fn wait_for(created: &OwnedFd) -> io::Result<()> {
    match read(created, &mut [0])? {
        0 => Err(io::Error::other("create a user namespace: the limit user.max_user_namespaces may be reached")),
        _ => Ok(()),
    }
}
