//! The place of a VM's processes on the host: their cgroup, and how eagerly the OOM killer takes them.

use std::fs::File;

use super::cgroup::HostCgroup;
use super::error::{BootError, io};
use super::plan::BootPlan;
use crate::host::process::ProcessId;

/// Opens the files through which processes join the VM's cgroup, if there is one.
pub(super) fn open_cgroups(plan: &BootPlan) -> Result<Vec<File>, BootError> {
    let opened = plan.cgroup.as_ref().map(HostCgroup::open).transpose();
    Ok(opened.map_err(io("open cgroup.procs of the VM's cgroup"))?.unwrap_or_default())
}

/// Takes containerd's protection from the OOM killer away from a process of the VM, which has inherited it.
pub(super) fn unprotect(plan: &BootPlan, process: ProcessId) -> Result<(), BootError> {
    let score = plan.oom_score_adj;
    let shown = score.map_or_else(|| "(none)".to_owned(), |score| score.to_string());
    process.set_oom_score(score).map_err(io(format!("process.oomScoreAdj {shown}: set it for process {}", process.pid)))
}
