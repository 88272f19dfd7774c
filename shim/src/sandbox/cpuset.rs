//! CPUs and memory nodes of the host that specs name. They concern the VM's processes, so the sandbox's cgroup on the
//! host gets what its containers name together. A container that names none adds nothing.

use husk_protos::chain::Chain;

use crate::rootfs::spec::resources::HostResources;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Cpusets, Sandbox};
use crate::sandbox::thread::blocking;
use crate::vm::affinity;
use crate::vm::cgroup::{CPUS, CgroupError, Cpuset, HostCgroup, MEMS};

/// The text for a cgroup's file: the kernel accepts lists that overlap. `None` if no container names any.
fn together<'a>(named: impl Iterator<Item = Option<&'a String>>) -> Option<String> {
    let mut lists: Vec<&str> = named.flatten().map(|list| list.trim()).collect();
    lists.sort_unstable();
    lists.dedup();
    (!lists.is_empty()).then(|| lists.join(","))
}

/// Keeps what `new` does not name.
fn merged(old: Option<&HostResources>, new: HostResources) -> HostResources {
    let old = old.cloned().unwrap_or_default();
    HostResources { cpus: new.cpus.or(old.cpus), mems: new.mems.or(old.mems) }
}

impl Sandbox {
    /// Restricts the sandbox's cgroup to what its containers name, including `id`. If it fails, nothing changes.
    pub(super) async fn restrict_cpuset(&self, id: &str, new: HostResources) -> Result<(), SandboxError> {
        if new == HostResources::default() {
            return Ok(());
        }
        // Locked meanwhile: changes apply in their order.
        let mut cpusets = self.cpusets.lock().await;
        let before = cpusets.get(id).cloned();
        let wanted = merged(before.as_ref(), new);
        cpusets.insert(id.to_owned(), wanted.clone());
        let applied = self.apply_cpusets(id, &cpusets).await;
        if applied.is_err() {
            replace(&mut cpusets, id, before);
            self.reapply(id, &cpusets).await;
        }
        applied.map_err(|error| with_own_value(error, &wanted))
    }

    /// Forgets what a container names.
    pub(super) async fn release_cpuset(&self, id: &str) {
        let mut cpusets = self.cpusets.lock().await;
        if cpusets.remove(id).is_some() {
            self.reapply(id, &cpusets).await;
        }
    }

    async fn reapply(&self, id: &str, cpusets: &Cpusets) {
        if let Err(error) = self.apply_cpusets(id, cpusets).await {
            tracing::warn!(container = id, error = %Chain(&error), "failed to restore the cpuset of the sandbox's cgroup");
        }
    }

    async fn apply_cpusets(&self, id: &str, cpusets: &Cpusets) -> Result<(), SandboxError> {
        let cgroup = self.cgroup.lock().await.clone();
        let wanted = [(CPUS, cpus_of(cpusets)), (MEMS, together(cpusets.values().map(|named| named.mems.as_ref())))];
        let apply = move || -> Result<_, SandboxError> {
            let mut ignored = Vec::new();
            for (set, value) in wanted {
                ignored.extend(apply(cgroup.as_ref(), set, value)?);
            }
            Ok(ignored)
        };
        for ignored in blocking("restrict the sandbox's cgroup", apply).await? {
            tracing::warn!(container = id, "{ignored}");
        }
        // After the cgroup: the kernel lets all threads run on its CPUs when they change.
        self.pin(cpusets).await
    }

    /// What a container names.
    pub(super) async fn cpuset_of(&self, id: &str) -> Option<HostResources> {
        self.cpusets.lock().await.get(id).cloned()
    }

    /// Reverts a change of what a container names.
    pub(super) async fn restore_cpuset(&self, id: &str, before: Option<HostResources>) {
        let mut cpusets = self.cpusets.lock().await;
        replace(&mut cpusets, id, before);
        self.reapply(id, &cpusets).await;
    }

    /// Lets the virtual CPUs run on the CPUs that the containers name, if any does. Call it when the VM has booted or has
    /// more of them.
    pub(super) async fn pin_vcpus(&self) -> Result<(), SandboxError> {
        let cpusets = self.cpusets.lock().await;
        if cpus_of(&cpusets).is_some() { self.pin(&cpusets).await } else { Ok(()) }
    }

    async fn pin(&self, cpusets: &Cpusets) -> Result<(), SandboxError> {
        // A VM that boots is pinned afterwards.
        let Ok(vm) = self.live_vm() else { return Ok(()) };
        let running = self.machine().map_or(1, |machine| machine.vcpus);
        // A list that only the kernel can parse has restricted the cgroup.
        let cpus = cpus_of(cpusets).and_then(|list| affinity::parse_list(&list));
        Ok(vm.pin_vcpus(cpus.as_ref(), running as usize).await?)
    }
}

fn replace(cpusets: &mut Cpusets, id: &str, named: Option<HostResources>) {
    match named {
        Some(named) => drop(cpusets.insert(id.to_owned(), named)),
        None => drop(cpusets.remove(id)),
    }
}

/// The CPUs that the containers name together.
fn cpus_of(cpusets: &Cpusets) -> Option<String> {
    together(cpusets.values().map(|named| named.cpus.as_ref()))
}

/// Applies one set, or returns why it is ignored. Without a value, the cgroup has what its parent has.
fn apply(cgroup: Option<&HostCgroup>, set: Cpuset, value: Option<String>) -> Result<Option<String>, SandboxError> {
    let Some(value) = value else {
        if let Some(cgroup) = cgroup {
            cgroup.clear_cpuset(set)?;
        }
        return Ok(None);
    };
    let field = set.field;
    let why = match cgroup.map(|cgroup| cgroup.set_cpuset(set, &value)).transpose()? {
        Some(true) => return Ok(None),
        Some(false) => "the sandbox's cgroup on the host has no cpuset controller, or was not created by husk",
        None => "the sandbox has no cgroup on the host",
    };
    let consequence = if set == CPUS {
        // Nothing else checks the list.
        affinity::check_list(&value).map_err(|why| CgroupError::NoCpus { field, value: value.clone(), why })?;
        "restricts only the virtual CPUs"
    } else {
        "ignored"
    };
    Ok(Some(format!("{field} {value:?}: {consequence}, because {why}")))
}

/// Names the container's own value in an error about what the sandbox's containers name together.
fn with_own_value(mut error: SandboxError, own: &HostResources) -> SandboxError {
    if let SandboxError::Cgroup(CgroupError::Rejected { field, value, .. } | CgroupError::NoCpus { field, value, .. }) =
        &mut error
    {
        let named = if *field == CPUS.field { &own.cpus } else { &own.mems };
        if let Some(named) = named {
            value.clone_from(named);
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_has_what_its_containers_name_together() {
        let lists = |lists: &[Option<&str>]| {
            let lists: Vec<_> = lists.iter().map(|list| list.map(str::to_owned)).collect();
            together(lists.iter().map(Option::as_ref))
        };
        assert_eq!(lists(&[None, None]), None);
        assert_eq!(lists(&[None, Some("2-3")]).as_deref(), Some("2-3"));
        assert_eq!(lists(&[Some("2-3"), Some("0-1\n"), Some("2-3")]).as_deref(), Some("0-1,2-3"));
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let resources = |cpus: Option<&str>, mems: Option<&str>| HostResources {
            cpus: cpus.map(Into::into),
            mems: mems.map(Into::into),
        };
        let old = resources(Some("1"), Some("0"));
        assert_eq!(merged(Some(&old), resources(Some("2"), None)), resources(Some("2"), Some("0")));
        assert_eq!(merged(None, resources(None, Some("1"))), resources(None, Some("1")));
    }

    #[test]
    fn a_cpuset_without_a_cgroup_is_checked_or_ignored_by_name() {
        let ignored = apply(None, CPUS, Some("0".into())).unwrap().unwrap();
        assert!(ignored.starts_with("linux.resources.cpu.cpus \"0\": restricts only the virtual CPUs"), "{ignored}");
        let ignored = apply(None, MEMS, Some("7".into())).unwrap().unwrap();
        assert!(ignored.starts_with("linux.resources.cpu.mems \"7\": ignored, because"), "{ignored}");
        assert_eq!(apply(None, MEMS, None).unwrap(), None);
        let wrong = apply(None, CPUS, Some("0,8191".into())).unwrap_err();
        let own = HostResources { cpus: Some("8191".into()), mems: None };
        let wrong = with_own_value(wrong, &own).to_string();
        assert!(wrong.starts_with("linux.resources.cpu.cpus \"8191\": the host has no CPU 8191"), "{wrong}");
    }
}
