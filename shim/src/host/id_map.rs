//! Mappings of users and groups, and the user namespaces by which the kernel takes them for ID-mapped mounts
//! (mount_setattr(2)).

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::host::holder;

/// Consecutive IDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MappedRange {
    /// The first ID inside of the user namespace: of a file on its filesystem.
    pub(crate) inside: u32,
    /// The first ID outside: what the mount shows.
    pub(crate) outside: u32,
    pub(crate) count: u32,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IdMap {
    pub(crate) users: Vec<MappedRange>,
    pub(crate) groups: Vec<MappedRange>,
}

impl IdMap {
    /// Creates a user namespace with the mapping. It exists as long as it is open or a mount has it.
    ///
    /// # Errors
    /// When there is no process for it, or the kernel rejects the mapping.
    pub(crate) fn namespace(&self) -> io::Result<File> {
        // Only a process can create one.
        let mut child = holder::start_in_user_namespace()?;
        let made = self.write(&Path::new("/proc").join(child.id().to_string()));
        let ended = child.kill().and_then(|()| child.wait());
        let namespace = made?;
        ended?;
        Ok(namespace)
    }

    fn write(&self, process: &Path) -> io::Result<File> {
        for (file, what, ranges) in [("uid_map", "users", &self.users), ("gid_map", "groups", &self.groups)] {
            // In one call (user_namespaces(7)).
            fs::write(process.join(file), text(ranges)).map_err(|error| {
                io::Error::new(error.kind(), format!("map {what} with {:?}: {error}", text(ranges)))
            })?;
        }
        File::open(process.join("ns/user"))
    }
}

/// The form of `/proc/<pid>/uid_map`.
fn text(ranges: &[MappedRange]) -> String {
    let line = |range: &MappedRange| format!("{} {} {}\n", range.inside, range.outside, range.count);
    ranges.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_namespace_has_the_mapping_and_no_process() {
        let range = |inside, outside, count| MappedRange { inside, outside, count };
        let map = IdMap { users: vec![range(0, 100_000, 10), range(10, 300_000, 5)], groups: vec![range(0, 7, 1)] };
        let namespace = map.namespace().unwrap();
        let own = fs::metadata("/proc/self/ns/user").unwrap();
        assert_ne!(namespace.metadata().unwrap().ino(), own.ino());
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
        let wrong = IdMap { users: vec![range(0, 1, 0)], groups: Vec::new() };
        let error = wrong.namespace().unwrap_err().to_string();
        assert!(error.starts_with("map users with \"0 1 0\\n\": "), "{error}");
    }
}
