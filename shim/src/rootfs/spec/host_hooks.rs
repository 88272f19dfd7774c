//! Decides which of a spec's hooks the host runs, which stay for the guest, and which are rejected.

use oci_spec::runtime::{Hook as SpecHook, Spec};

use super::findings::Findings;
use crate::host::hooks::{Hook, Hooks};

/// containerd's hook program (`containerd oci-hook`, which `ctr run --gpus` uses) replaces these by the container's PID
/// and root folder. The programs that it runs enter the mount namespace of that PID, which is the host's.
const CONTAINER_PLACEHOLDERS: [&str; 2] = ["{{pid}}", "{{rootfs}}"];
/// The annotation with which nerdctl lists, as JSON, the networks that its hooks attach a container to.
const NERDCTL_NETWORKS: &str = "nerdctl/networks";
/// Networks for which nerdctl's hooks add no link. `host` is the VM's network.
const NETWORKS_WITHOUT_LINK: [&str; 2] = ["none", "host"];
/// Prefix of another container's network.
const NETWORK_OF_CONTAINER: &str = "container:";

/// Removes the host's hooks from the spec and returns them. `startContainer` hooks are programs in the container's
/// root, so they stay.
// `prestart` is deprecated in favour of `createRuntime`, but some clients still send it.
#[allow(deprecated)]
pub(super) fn take_host_hooks(spec: &mut Spec, findings: &mut Findings) -> Hooks {
    let Some(mut hooks) = spec.hooks().clone() else { return Hooks::default() };
    for (index, hook) in hooks.create_container().iter().flatten().enumerate() {
        let why = "a program of the host cannot run in the namespaces of a container in a VM";
        findings.reject_path(format!("hooks.createContainer[{index}].path"), hook.path(), why);
    }
    let mut create = host_hooks("prestart", hooks.prestart_mut().take(), findings);
    create.extend(host_hooks("createRuntime", hooks.create_runtime_mut().take(), findings));
    let taken = Hooks {
        create,
        poststart: host_hooks("poststart", hooks.poststart_mut().take(), findings),
        poststop: host_hooks("poststop", hooks.poststop_mut().take(), findings),
    };
    spec.set_hooks(hooks.start_container().is_some().then_some(hooks));
    taken
}

fn host_hooks(list: &str, hooks: Option<Vec<SpecHook>>, findings: &mut Findings) -> Vec<Hook> {
    let hooks = hooks.into_iter().flatten().enumerate();
    hooks.map(|(index, hook)| host_hook(format!("hooks.{list}[{index}]"), &hook, findings)).collect()
}

fn host_hook(field: String, hook: &SpecHook, findings: &mut Findings) -> Hook {
    let args = hook.args().clone().unwrap_or_default();
    if !hook.path().is_absolute() {
        findings.reject_path(format!("{field}.path"), hook.path(), "must be an absolute path");
    }
    if args.iter().any(|arg| CONTAINER_PLACEHOLDERS.iter().any(|placeholder| arg.contains(placeholder))) {
        let why = "a program of the host cannot act on a container in a VM";
        findings.reject_path(format!("{field}.path"), hook.path(), why);
    }
    let timeout = hook.timeout().map(|seconds| u32::try_from(seconds).ok().filter(|&seconds| seconds > 0));
    if timeout == Some(None) {
        let value = hook.timeout().map(|seconds| seconds.to_string());
        findings.reject(format!("{field}.timeout"), value.as_deref(), "must be a number of seconds greater than zero");
    }
    let env = hook.env().clone().unwrap_or_default();
    Hook { path: hook.path().clone(), args, env, timeout: timeout.flatten(), field }
}

/// The number of links that nerdctl's hooks add to the container's network namespace.
pub(super) fn announced_links(spec: &Spec) -> usize {
    let value = spec.annotations().as_ref().and_then(|all| all.get(NERDCTL_NETWORKS));
    // In another format, it announces nothing. The spare network cards suffice for most networks anyway.
    let networks: Vec<String> = value.and_then(|value| serde_json::from_str(value).ok()).unwrap_or_default();
    let has_link =
        |name: &&String| !NETWORKS_WITHOUT_LINK.contains(&name.as_str()) && !name.starts_with(NETWORK_OF_CONTAINER);
    networks.iter().filter(has_link).count()
}
