//! Which of a spec's hooks the host runs, which stay for the guest, and which can be nobody's.

use oci_spec::runtime::{Hook as SpecHook, Spec};

use crate::host::hooks::{Hook, Hooks};
use crate::rootfs::spec::Work;

/// containerd's own hook program (`containerd oci-hook`, and so `ctr run --gpus`) puts the container's pid and root folder in place of these.
const INTO_THE_CONTAINER: [&str; 2] = ["{{pid}}", "{{rootfs}}"];
/// nerdctl's hooks attach a container to the networks that this annotation lists as JSON.
const NERDCTL_NETWORKS: &str = "nerdctl/networks";
/// Those that need nothing from the host. `host` is the VM's.
const WITHOUT_CNI: [&str; 2] = ["none", "host"];

impl Work<'_> {
    /// Takes the host's hooks out of the spec. Those of `startContainer` are looked up in the container's own root, so they stay.
    // `prestart` is deprecated in favour of createRuntime, and still what some clients send.
    #[allow(deprecated)]
    pub(super) fn host_hooks(&mut self, spec: &mut Spec) -> Hooks {
        let Some(mut hooks) = spec.hooks().clone() else { return Hooks::default() };
        for (index, hook) in hooks.create_container().iter().flatten().enumerate() {
            let why = "a program of the host cannot run in the namespaces of a container in a VM";
            self.refuse_path(format!("hooks.createContainer[{index}].path"), hook.path(), why);
        }
        let mut create = self.taken("prestart", hooks.prestart_mut().take());
        create.extend(self.taken("createRuntime", hooks.create_runtime_mut().take()));
        let taken = Hooks {
            create,
            poststart: self.taken("poststart", hooks.poststart_mut().take()),
            poststop: self.taken("poststop", hooks.poststop_mut().take()),
        };
        spec.set_hooks(hooks.start_container().is_some().then_some(hooks));
        if !taken.is_empty() {
            self.nerdctl_networks(spec);
        }
        taken
    }

    fn taken(&mut self, list: &str, hooks: Option<Vec<SpecHook>>) -> Vec<Hook> {
        let hooks = hooks.into_iter().flatten().enumerate();
        hooks.map(|(index, hook)| self.host_hook(format!("hooks.{list}[{index}]"), &hook)).collect()
    }

    fn host_hook(&mut self, field: String, hook: &SpecHook) -> Hook {
        let args = hook.args().clone().unwrap_or_default();
        if !hook.path().is_absolute() {
            self.refuse_path(format!("{field}.path"), hook.path(), "must be an absolute path");
        }
        if args.iter().any(|arg| INTO_THE_CONTAINER.iter().any(|place| arg.contains(place))) {
            let why = "a program of the host cannot act on a container in a VM";
            self.refuse_path(format!("{field}.path"), hook.path(), why);
        }
        let timeout = hook.timeout().map(|seconds| u32::try_from(seconds).ok().filter(|&seconds| seconds > 0));
        if timeout == Some(None) {
            let value = hook.timeout().map(|seconds| seconds.to_string());
            self.refuse(format!("{field}.timeout"), value.as_deref(), "must be a number of seconds greater than zero");
        }
        let env = hook.env().clone().unwrap_or_default();
        Hook { path: hook.path().clone(), args, env, timeout: timeout.flatten(), field }
    }

    /// Its hook would fail for want of a network namespace, and say so less clearly.
    fn nerdctl_networks(&mut self, spec: &Spec) {
        let Some(value) = spec.annotations().as_ref().and_then(|all| all.get(NERDCTL_NETWORKS)) else { return };
        let networks: Vec<String> = serde_json::from_str(value).unwrap_or_default();
        if networks.iter().any(|network| !WITHOUT_CNI.contains(&network.as_str())) {
            let why = "networks of the host (CNI) are not supported yet: use --network none";
            self.refuse(format!("annotations {NERDCTL_NETWORKS}"), Some(value), why);
        }
    }
}
