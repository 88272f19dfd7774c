//! New limits for a running container: the host's part, the guest's, and the VM's size. A VM gets the virtual CPUs and
//! the memory that the limits of its containers need together, as far as its machine has some to spare.

use containerd_shim_protos::api::UpdateTaskRequest;
use husk_protos::chain::Chain;
use husk_protos::lock::lock;
use husk_protos::system::InfoRequest;

use crate::config::settings::GUEST_OVERHEAD_MIB;
use crate::prepare::PrepareError;
use crate::prepare::size::Size;
use crate::rootfs::spec::resources::HostResources;
use crate::rootfs::spec::{Demand, resources};
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::state::MachineRecord;
use crate::vm::Vm;

/// End of the type URL under which containerd sends the JSON of `LinuxResources`.
const RESOURCES: &str = "/LinuxResources";

impl Sandbox {
    /// Records the limits of a container that is being created.
    pub(super) fn demand(&self, id: &str, demand: Demand) {
        lock(&self.demands).insert(id.to_owned(), demand);
    }

    /// Forgets the limits of a container.
    pub(super) fn release_demand(&self, id: &str) {
        lock(&self.demands).remove(id);
    }

    /// Changes a container's limits: the host's part, and the guest's. If it fails, no limit changes; the VM keeps the
    /// virtual CPUs and the memory that it may have got.
    pub(crate) async fn update(&self, mut request: UpdateTaskRequest) -> Result<(), SandboxError> {
        let vm = self.vm_of(&request.id)?;
        let Some(given) = request.resources.as_mut().filter(|given| given.type_url.ends_with(RESOURCES)) else {
            // The guest rejects it with what it is.
            return update_in_guest(&vm, &request).await;
        };
        let id = request.id.clone();
        let invalid = |problems: Vec<String>| {
            PrepareError(problems.into_iter().map(|problem| format!("update {id}: {problem}")).collect())
        };
        let update = resources::update(&given.value).map_err(invalid)?;
        for note in update.notes {
            tracing::info!(container = id, note, "ignored part of an update");
        }
        given.value = update.guest;
        let before = self.demand_of(&id, update.demand).map_err(invalid)?;
        let updated = self.update_both(&vm, &request, update.host, before).await;
        if updated.is_err() {
            self.demand(&id, before);
            self.limit_cgroup_again(&id).await;
        }
        updated
    }

    /// Changes the limits on the host and in the guest.
    async fn update_both(
        &self,
        vm: &Vm,
        request: &UpdateTaskRequest,
        host: HostResources,
        before: Demand,
    ) -> Result<(), SandboxError> {
        self.grow(vm, &request.id, before).await?;
        self.limit_cgroup(&request.id).await?;
        if host == HostResources::default() {
            return update_in_guest(vm, request).await;
        }
        let id = &request.id;
        let before = self.cpuset_of(id).await;
        self.restrict_cpuset(id, host).await?;
        let updated = update_in_guest(vm, request).await;
        if updated.is_err() {
            self.restore_cpuset(id, before).await;
        }
        updated
    }

    /// Reserves room in the VM for a container's new limits, and returns the old ones.
    fn demand_of(&self, id: &str, new: Demand) -> Result<Demand, Vec<String>> {
        let machine = self.machine();
        let mut demands = lock(&self.demands);
        let before = demands.get(id).copied().unwrap_or_default();
        let after = before.updated(new);
        let others = demands.iter().filter(|(other, _)| *other != id).map(|(_, demand)| *demand);
        let problems = machine.map(|machine| beyond(before, after, others, &machine)).unwrap_or_default();
        if !problems.is_empty() {
            return Err(problems);
        }
        demands.insert(id.to_owned(), after);
        Ok(before)
    }

    /// Gives the guest what its containers' limits need together, after those of the container `id` have changed.
    async fn grow(&self, vm: &Vm, id: &str, before: Demand) -> Result<(), SandboxError> {
        let _one_at_a_time = self.growth.lock().await;
        let after = lock(&self.demands).get(id).copied().unwrap_or_default();
        // Unlike a virtual CPU, memory has a price. A limit that was larger than the VM from the start does not grow it.
        if let Some(limit) = after.memory().filter(|&limit| before.memory().is_none_or(|before| limit > before)) {
            self.add_memory(vm, id, limit).await?;
        }
        self.add_vcpus(vm).await
    }

    /// Gives the guest the memory that its containers' limits need together, for the new limit of one of them. The limit
    /// of the sandbox's cgroup grows first, and stays the only one that a hostile guest cannot evade.
    async fn add_memory(&self, vm: &Vm, id: &str, limit: u64) -> Result<(), SandboxError> {
        let Some(size) = self.size() else { return Ok(()) };
        let needed = lock(&self.demands).values().copied().filter_map(Demand::memory).fold(0, u64::saturating_add);
        let mib = size.memory_for(needed.div_ceil(1 << 20).saturating_add(GUEST_OVERHEAD_MIB));
        if mib <= size.memory_mib {
            return Ok(());
        }
        self.record_memory(size.memory_mib, mib)?;
        if let Err(error) = self.limit_cgroup(id).await {
            self.record_memory(mib, size.memory_mib)?;
            return Err(error);
        }
        let Err(source) = vm.grow_memory(mib).await else {
            tracing::info!(from = size.memory_mib, to = mib, "the guest has got memory, in MiB");
            return Ok(());
        };
        match vm.keep_memory(|taken| size.memory_for(taken)).await {
            Ok(kept) => {
                self.record_memory(mib, kept)?;
                self.limit_cgroup_again(id).await;
            }
            // The limit stays: the guest may have it all.
            Err(error) => tracing::warn!(error = %Chain(&error), "failed to take an offer of memory back"),
        }
        Err(SandboxError::Growth { limit, source })
    }

    /// Records a change of the VM's memory, also for the limit of the sandbox's cgroup.
    fn record_memory(&self, from_mib: u64, to_mib: u64) -> Result<(), SandboxError> {
        if let Some(limit) = &mut *lock(&self.host_memory) {
            *limit = limit.saturating_add(to_mib << 20).saturating_sub(from_mib << 20);
        }
        self.journal.change_machine(|machine| machine.memory_mib = to_mib)?;
        Ok(())
    }

    /// Gives the guest the virtual CPUs that its containers' limits need together.
    async fn add_vcpus(&self, vm: &Vm) -> Result<(), SandboxError> {
        let Some(machine) = self.machine() else { return Ok(()) };
        let needed: u64 =
            lock(&self.demands).values().filter_map(|demand| demand.milli_cpus()).fold(0, u64::saturating_add);
        let needed = u32::try_from(needed.div_ceil(1000)).unwrap_or(u32::MAX).min(machine.max_vcpus);
        if needed <= machine.vcpus {
            return Ok(());
        }
        // One at a time: the guest serves nothing else meanwhile.
        for number in machine.vcpus..needed {
            let start = InfoRequest { start_cpu: number, ..Default::default() };
            vm.guest.system.info(vm.guest.context(), &start).await?;
            self.journal.change_machine(|machine| machine.vcpus = machine.vcpus.max(number + 1))?;
        }
        tracing::info!(from = machine.vcpus, to = needed, "the guest has got virtual CPUs");
        self.pin_vcpus().await
    }

    /// The VM's machine, as far as it is known.
    pub(super) fn machine(&self) -> Option<MachineRecord> {
        let machine = self.journal.with(|state| Ok(state.machine().cloned())).ok().flatten()?;
        let max_memory_mib = machine.max_memory_mib.max(machine.memory_mib);
        Some(MachineRecord { max_vcpus: machine.max_vcpus.max(machine.vcpus), max_memory_mib, ..machine })
    }

    /// The VM's size now, as far as it is known.
    pub(super) fn size(&self) -> Option<Size> {
        let MachineRecord { vcpus, max_vcpus, memory_mib, max_memory_mib, .. } = self.machine()?;
        Some(Size { vcpus, max_vcpus, memory_mib, max_memory_mib })
    }
}

async fn update_in_guest(vm: &Vm, request: &UpdateTaskRequest) -> Result<(), SandboxError> {
    vm.guest.task.update(vm.guest.context(), request).await?;
    Ok(())
}

/// What of a container's limits the VM has no room for, beside those of its other containers. A limit that does not grow
/// is accepted: it is not worse than before.
fn beyond(
    before: Demand,
    after: Demand,
    others: impl Iterator<Item = Demand> + Clone,
    machine: &MachineRecord,
) -> Vec<String> {
    let mut problems = Vec::new();
    let grows = |before: Option<u64>, after: u64| before.is_none_or(|before| after > before);
    if let Some(limit) = after.memory().filter(|&limit| grows(before.memory(), limit)) {
        let others = others.clone().filter_map(Demand::memory).fold(0, u64::saturating_add);
        let room = machine.max_memory_mib.saturating_sub(GUEST_OVERHEAD_MIB) << 20;
        if limit.saturating_add(others) > room {
            let (most, key) = if machine.max_memory_mib > machine.memory_mib {
                (format!("can have at most {} MiB", machine.max_memory_mib), "max_memory_mib")
            } else {
                ("cannot grow".to_owned(), "memory_mib")
            };
            problems.push(format!(
                "linux.resources.memory.limit {limit:?}: the VM ({}) has {} MiB and {most}; {GUEST_OVERHEAD_MIB} \
                 MiB are for the guest itself and {} MiB for the sandbox's other containers: create the sandbox anew, or \
                 with a larger {key}",
                machine.board,
                machine.memory_mib,
                others >> 20,
            ));
        }
    }
    if let Some(milli) = after.milli_cpus().filter(|&milli| grows(before.milli_cpus(), milli)) {
        let others = others.filter_map(Demand::milli_cpus).fold(0, u64::saturating_add);
        if milli.saturating_add(others) > u64::from(machine.max_vcpus) * 1000 {
            problems.push(format!(
                "linux.resources.cpu.quota {:?}: means {} CPUs, and the sandbox's other containers have {}, but the VM ({}) \
                 has {} virtual CPUs and can have at most {}: create the sandbox anew, or with more max_vcpus",
                after.quota().unwrap_or_default(),
                decimal(milli),
                decimal(others),
                machine.board,
                machine.vcpus,
                machine.max_vcpus,
            ));
        }
    }
    problems
}

/// Thousandths as a decimal number.
fn decimal(milli: u64) -> String {
    let text = format!("{}.{:03}", milli / 1000, milli % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::host::process::ProcessId;

    fn machine(vcpus: u32, max_vcpus: u32, memory_mib: u64, max_memory_mib: u64) -> MachineRecord {
        let process = ProcessId { pid: 1, start_time: 1 };
        let machine = json!({
            "process": process, "cid": 3, "vcpus": vcpus, "max_vcpus": max_vcpus, "memory_mib": memory_mib,
            "max_memory_mib": max_memory_mib, "accel": "Tcg",
            "board": "Microvm", "kernel_file": "/k", "initrd_file": "/i", "kernel": null, "init": null,
        });
        serde_json::from_value(machine).unwrap()
    }

    fn demand(resources: &Value) -> Demand {
        resources::update(&serde_json::to_vec(resources).unwrap()).unwrap().demand
    }

    #[test]
    fn limits_beyond_the_vm_are_rejected_by_field_and_value_with_the_vms_size() {
        let mib = |mib: i64| json!({"memory": {"limit": mib << 20}});
        let cpus = |quota: i64| json!({"cpu": {"quota": quota, "period": 100_000}});
        let memory = |limit: i64, others: i64| {
            format!(
                "linux.resources.memory.limit {}: the VM (Microvm) has 512 MiB and cannot grow; 128 MiB are for the \
                 guest itself and {others} MiB for the sandbox's other containers: create the sandbox anew, or with a larger \
                 memory_mib",
                limit << 20
            )
        };
        let quota = |quota: i64, means: &str, others: &str| {
            format!(
                "linux.resources.cpu.quota {quota}: means {means} CPUs, and the sandbox's other containers have {others}, but \
                 the VM (Microvm) has 1 virtual CPUs and can have at most 3: "
            )
        };
        for (before, new, others, expected) in [
            (json!({}), mib(384), vec![], None),
            (json!({}), mib(385), vec![], Some(memory(385, 0))),
            (mib(64), mib(300), vec![mib(84)], None),
            (mib(64), mib(301), vec![mib(83), mib(1)], Some(memory(301, 84))),
            // It was created so.
            (mib(1000), mib(1000), vec![], None),
            (mib(1000), mib(900), vec![], None),
            (mib(1000), mib(1001), vec![], Some(memory(1001, 0))),
            (mib(64), mib(-1), vec![], None),
            (mib(64), json!({"pids": {"limit": 3}}), vec![mib(900)], None),
            (json!({}), cpus(300_000), vec![], None),
            (json!({}), cpus(300_001), vec![], Some(quota(300_001, "3.001", "0"))),
            (cpus(50_000), cpus(250_000), vec![cpus(150_000)], Some(quota(250_000, "2.5", "1.5"))),
            (cpus(50_000), cpus(-1), vec![], None),
        ] {
            let before = demand(&before);
            let others: Vec<_> = others.iter().map(demand).collect();
            let problems = beyond(before, before.updated(demand(&new)), others.into_iter(), &machine(1, 3, 512, 512));
            assert_eq!(problems.len(), usize::from(expected.is_some()), "{new}: {problems:?}");
            if let (Some(problem), Some(expected)) = (problems.first(), expected) {
                assert!(problem.starts_with(&expected), "{problem}\n{expected}");
            }
        }
        let both = json!({"memory": {"limit": 1_i64 << 40}, "cpu": {"quota": 900_000}});
        assert_eq!(beyond(Demand::default(), demand(&both), [].into_iter(), &machine(1, 1, 512, 512)).len(), 2);

        let grows =
            |mib_limit| beyond(Demand::default(), demand(&mib(mib_limit)), [].into_iter(), &machine(1, 1, 512, 1024));
        assert!(grows(896).is_empty(), "{:?}", grows(896));
        assert!(grows(897)[0].contains("has 512 MiB and can have at most 1024 MiB; 128 MiB"), "{:?}", grows(897));
        assert!(grows(897)[0].ends_with("with a larger max_memory_mib"), "{:?}", grows(897));
    }
}
