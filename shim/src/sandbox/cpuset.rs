//! CPUs and memory nodes of the host that specs name. They concern the VM's processes, so the sandbox's cgroup on the
//! host gets what its containers name together. A container that names none adds nothing.

use containerd_shim_protos::api::UpdateTaskRequest;
use husk_protos::chain::Chain;

use crate::prepare::PrepareError;
use crate::rootfs::spec::resources;
use crate::rootfs::spec::resources::HostResources;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Cpusets, Sandbox};
use crate::sandbox::thread::blocking;
use crate::vm::Vm;
use crate::vm::cgroup::{CPUS, Cpuset, HostCgroup, MEMS};

/// End of the type URL under which containerd sends the JSON of `LinuxResources`.
const RESOURCES: &str = "/LinuxResources";

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
        cpusets.insert(id.to_owned(), wanted);
        let applied = self.apply_cpusets(id, &cpusets).await;
        if applied.is_err() {
            match before {
                Some(before) => drop(cpusets.insert(id.to_owned(), before)),
                None => drop(cpusets.remove(id)),
            }
            self.reapply(id, &cpusets).await;
        }
        applied
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
        let wanted = [
            (CPUS, together(cpusets.values().map(|named| named.cpus.as_ref()))),
            (MEMS, together(cpusets.values().map(|named| named.mems.as_ref()))),
        ];
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
        Ok(())
    }

    /// Changes a container's limits: the host's part, and the guest's. The VM keeps its size. If it fails, nothing
    /// changes.
    pub(crate) async fn update(&self, mut request: UpdateTaskRequest) -> Result<(), SandboxError> {
        let vm = self.vm_of(&request.id)?;
        let Some(given) = request.resources.as_mut().filter(|given| given.type_url.ends_with(RESOURCES)) else {
            // The guest rejects it with what it is.
            return update_in_guest(&vm, &request).await;
        };
        let id = request.id.clone();
        let update = resources::update(&given.value).map_err(|problems| {
            PrepareError(problems.into_iter().map(|problem| format!("update {id}: {problem}")).collect())
        })?;
        for note in update.notes {
            tracing::info!(container = id, note, "ignored part of an update");
        }
        given.value = update.guest;
        if update.host == HostResources::default() {
            return update_in_guest(&vm, &request).await;
        }
        let before = self.cpusets.lock().await.get(&id).cloned();
        self.restrict_cpuset(&id, update.host).await?;
        let updated = update_in_guest(&vm, &request).await;
        if updated.is_err() {
            let mut cpusets = self.cpusets.lock().await;
            match before {
                Some(before) => drop(cpusets.insert(id.clone(), before)),
                None => drop(cpusets.remove(&id)),
            }
            self.reapply(&id, &cpusets).await;
        }
        updated
    }
}

async fn update_in_guest(vm: &Vm, request: &UpdateTaskRequest) -> Result<(), SandboxError> {
    vm.guest.task.update(vm.guest.context(), request).await?;
    Ok(())
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
    let Some(cgroup) = cgroup else {
        return Ok(Some(format!("{field} {value:?}: ignored, because the sandbox has no cgroup on the host")));
    };
    let why = "ignored, because the sandbox's cgroup on the host has no cpuset controller, or was not created by husk";
    Ok((!cgroup.set_cpuset(set, &value)?).then(|| format!("{field} {value:?}: {why}")))
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
    fn a_cpuset_without_a_cgroup_is_ignored_by_name() {
        let ignored = apply(None, CPUS, Some("2-3".into())).unwrap().unwrap();
        assert!(ignored.starts_with("linux.resources.cpu.cpus \"2-3\": ignored, because"), "{ignored}");
        assert_eq!(apply(None, MEMS, None).unwrap(), None);
    }
}
