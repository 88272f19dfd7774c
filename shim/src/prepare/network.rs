//! Whether a container is in user mode, and with which ports.

use std::path::Path;

use husk_protos::chain::Chain;
use oci_spec::runtime::LinuxNamespaceType;

use crate::config::names;
use crate::config::problem::Problem;
use crate::config::settings::{Config, NetworkMode};
use crate::network::user::{HostPort, PortMapping, UserNetwork};
use crate::rootfs::spec::Rewritten;
use crate::state::ports::PortLeases;

/// What a container's annotations request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestedNetwork {
    pub(super) mode: Option<NetworkMode>,
    pub(super) ports: Vec<PortMapping>,
}

impl RequestedNetwork {
    /// What the sandbox's VM, booted with the user-mode network `booted`, lacks of this.
    pub(crate) fn beyond(&self, booted: Option<&UserNetwork>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mode = if booted.is_some() { NetworkMode::User } else { NetworkMode::None };
        if let Some(requested) = self.mode.filter(|requested| *requested != mode) {
            let with = if booted.is_some() { "with" } else { "without" };
            let why = format!("the sandbox's VM was booted {with} user-mode networking");
            problems.push(problem(names::NETWORK, format!("{:?}", requested.name()), why));
        }
        let present = booted.map_or(&[][..], |booted| &booted.ports);
        for port in self.ports.iter().filter(|port| !present.contains(port)) {
            let why = "the sandbox's VM was booted without it, and ports cannot be added later";
            problems.push(problem(names::PORTS, port.to_string(), why.to_owned()));
        }
        problems
    }
}

/// The sandbox's network in user mode, `None` without user mode. `booted` is that of the sandbox's VM, if it is booted.
/// Pure.
///
/// # Errors
/// What the annotations request and the spec, the configuration or the VM do not allow.
pub(super) fn user_network(
    requested: &RequestedNetwork,
    config: &Config,
    rewritten: &Rewritten,
    booted: Option<Option<&UserNetwork>>,
) -> Result<Option<UserNetwork>, Vec<Problem>> {
    let mut problems = Vec::new();
    if let (Some(mode), Some(host)) = (requested.mode, rewritten.network.of_host()) {
        let named = host.path.display();
        let why = format!("the spec names the network namespace {named} ({}): the VM is connected to it", host.field);
        problems.push(problem(names::NETWORK, format!("{:?}", mode.name()), why));
    }
    let network = match booted {
        Some(booted) => booted.cloned(),
        None => (mode(requested, config, rewritten) == NetworkMode::User)
            .then(|| UserNetwork { ports: requested.ports.clone() }),
    };
    let booted = booted.filter(|_| rewritten.network.of_host().is_none());
    if booted.is_none() && network.is_none() && !requested.ports.is_empty() {
        let value = requested.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let why = format!("ports need user-mode networking ({} = \"user\")", names::NETWORK);
        problems.push(problem(names::PORTS, value, why));
    } else if let Some(booted) = booted {
        problems.extend(requested.beyond(booted));
    }
    if network.is_some() && has_user_namespace(rewritten) {
        let why = "a container with a user namespace cannot use user-mode networking yet";
        problems.push(Problem { key: "config.json: linux.namespaces".to_owned(), value: None, why: why.to_owned() });
    }
    if problems.is_empty() { Ok(network) } else { Err(problems) }
}

/// The mode of a VM that is not booted. Programs that connect networks themselves do so in a hook, so the
/// configuration's default does not apply to their containers.
fn mode(requested: &RequestedNetwork, config: &Config, rewritten: &Rewritten) -> NetworkMode {
    if rewritten.network.of_host().is_some() {
        return NetworkMode::None;
    }
    let default = if rewritten.hooks.create.is_empty() { config.network } else { NetworkMode::None };
    requested.mode.unwrap_or(default)
}

/// Checks that the ports of the VM that has to be booted for `sandbox` are free. Another process may still take one
/// before the VM starts; another sandbox cannot, because the boot leases them.
pub(super) fn check_ports(network: &UserNetwork, state: &Path, sandbox: &str) -> Result<(), Vec<Problem>> {
    let ports: Vec<HostPort> = network.ports.iter().map(|mapping| mapping.host).collect();
    let texts: Vec<String> = match PortLeases::under(state).taken(&ports, sandbox) {
        Ok(taken) => taken.iter().map(|taken| Chain(taken).to_string()).collect(),
        Err(error) => vec![Chain(&error).to_string()],
    };
    let problem = |why| Problem { key: format!("annotation {}", names::PORTS), value: None, why };
    if texts.is_empty() { Ok(()) } else { Err(texts.into_iter().map(problem).collect()) }
}

fn problem(name: &str, value: String, why: String) -> Problem {
    Problem { key: format!("annotation {name}"), value: Some(value), why }
}

fn has_user_namespace(rewritten: &Rewritten) -> bool {
    let mut namespaces = rewritten.spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}
