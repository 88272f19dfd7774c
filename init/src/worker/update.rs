//! Update: new limits for a container, in place.
//!
//! In a worker although libcontainer has no part in it: a write to memory.max reclaims and kills until the new limit holds, and PID 1 has
//! others to serve meanwhile.

use std::io::ErrorKind;
use std::os::fd::AsFd;

use oci_spec::runtime::{LinuxResources, Spec};

use super::serve::decode;
use super::spec;
use crate::cgroup::{self, limits};
use crate::error::{Error, Kind};
use crate::places;

/// Sets the limits that the standard input names, all or none of them.
pub fn update(id: &str) -> Result<(), Error> {
    let invalid = |what: String| Error::new(Kind::InvalidArgument, format!("update {id}: {what}"));
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let input = input.map_err(|e| Error::internal("take the standard input", &e))?;
    let resources: LinuxResources = decode(input.into()).map_err(|e| invalid(format!("linux.resources: {e}")))?;
    let config = places::bundle(id).join("config.json");
    let spec = Spec::load(&config).map_err(|e| Error::internal(format_args!("read {}", config.display()), &e))?;
    let group = cgroup::of(id);
    let present =
        limits::Present::of(&group).map_err(|e| Error::internal(format_args!("read the limits of {id}"), &e))?;

    let mut problems = spec::check_update(&spec, &resources);
    let planned = limits::plan(&resources, &present).unwrap_or_else(|more| {
        problems.extend(more);
        Vec::new()
    });
    if !problems.is_empty() {
        return Err(invalid(problems.join("; ")));
    }
    limits::apply(&group, &planned).map_err(|refused| {
        let kind = match refused.source.kind() {
            ErrorKind::InvalidInput => Kind::InvalidArgument,
            ErrorKind::ResourceBusy => Kind::FailedPrecondition,
            // ERANGE, of a number that the file does not take.
            _ if refused.source.raw_os_error() == Some(libc::ERANGE) => Kind::InvalidArgument,
            _ => Kind::Internal,
        };
        Error::new(kind, format!("update {id}: {refused}"))
    })
}
