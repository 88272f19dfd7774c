//! Leases of the host's ports, so that two sandboxes never race for one: the files
//! `<state>/.ports/<protocol>-<address>-<port>`.

use std::path::Path;

use husk_protos::chain::Chain;
use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::lease::{Holder, LeaseDir, LeaseError};
use crate::host::process::ProcessId;
use crate::network::user::{BindError, HostPort};

const DIR: &str = ".ports";

/// Why ports cannot be leased.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// A file operation failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The undo step could not be recorded.
    #[error(transparent)]
    State(#[from] StateError),
    /// Ports that others have, or that cannot be bound.
    #[error("{}", .0.iter().map(|taken| Chain(taken).to_string()).collect::<Vec<_>>().join("; "))]
    Taken(Vec<TakenPort>),
}

/// A port that cannot be leased.
#[derive(Debug, thiserror::Error)]
pub enum TakenPort {
    /// Another sandbox has it.
    #[error("the host's port {port} is in use by sandbox {sandbox} in namespace {namespace} (as {leased})")]
    Leased {
        /// The port.
        port: HostPort,
        /// The port that the other sandbox has leased.
        leased: HostPort,
        /// containerd's namespace.
        namespace: String,
        /// The sandbox.
        sandbox: String,
    },
    /// Another process has it, or it cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// The leases of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct PortLeases {
    dir: LeaseDir,
}

impl PortLeases {
    /// The leases that are kept beside the sandboxes under `base`.
    pub(crate) fn under(base: &Path) -> Self {
        Self { dir: LeaseDir::under(base, DIR) }
    }

    /// Leases all of the ports or none. `record` runs before the leases are written.
    ///
    /// # Errors
    /// Every port that is in use, a failed file operation, or an error of `record`.
    pub(crate) fn lease(
        &self,
        ports: &[HostPort],
        holder: &Holder,
        record: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), PortError> {
        if ports.is_empty() {
            return Ok(());
        }
        let locked = self.dir.lock()?;
        let taken = self.taken(ports, &holder.sandbox)?;
        if !taken.is_empty() {
            return Err(PortError::Taken(taken));
        }
        record()?;
        for port in ports {
            self.dir.write(&locked, &port.file_name(), holder)?;
        }
        Ok(())
    }

    /// Those of the ports that `sandbox`, served by this process, cannot lease now, and why. Changes nothing.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn taken(&self, ports: &[HostPort], sandbox: &str) -> Result<Vec<TakenPort>, LeaseError> {
        if ports.is_empty() {
            return Ok(Vec::new());
        }
        let names = self.dir.names()?;
        let leased: Vec<HostPort> = names.iter().filter_map(|name| HostPort::from_file_name(name)).collect();
        let mut taken = Vec::new();
        for port in ports {
            match self.leased_by(port, &leased, sandbox)? {
                Some(leased) => taken.push(leased),
                None => taken.extend(port.check().err().map(TakenPort::from)),
            }
        }
        Ok(taken)
    }

    /// The other sandbox that has leased the port. A failed boot leaves its own lease to the sandbox's next boot.
    fn leased_by(&self, port: &HostPort, leased: &[HostPort], own: &str) -> Result<Option<TakenPort>, LeaseError> {
        for other in leased.iter().filter(|other| other.overlaps(port)) {
            let Some(Holder { namespace, sandbox, shim }) = self.dir.living_holder(&other.file_name())? else {
                continue;
            };
            if shim.pid != std::process::id() || sandbox != own {
                return Ok(Some(TakenPort::Leased { port: *port, leased: *other, namespace, sandbox }));
            }
        }
        Ok(None)
    }

    /// Releases ports, except those that another shim has leased by now.
    ///
    /// # Errors
    /// A failed file operation.
    pub(crate) fn release(&self, ports: &[HostPort], shim: ProcessId) -> Result<(), LeaseError> {
        self.dir.release(ports.iter().map(HostPort::file_name), shim)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::network::user::Protocol;

    /// A port that nothing on this machine uses at the moment.
    fn free() -> HostPort {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        HostPort { protocol: Protocol::Tcp, address: Ipv4Addr::LOCALHOST, port }
    }

    fn holder(sandbox: &str, shim: ProcessId) -> Holder {
        Holder { namespace: "ns".into(), sandbox: sandbox.into(), shim }
    }

    fn own(sandbox: &str) -> Holder {
        holder(sandbox, ProcessId::own().unwrap())
    }

    #[test]
    fn a_leased_port_names_its_sandbox_until_it_is_released() {
        let base = tempfile::tempdir().unwrap();
        let leases = PortLeases::under(base.path());
        let (first, second) = (free(), free());
        assert!(leases.taken(&[first], "db").unwrap().is_empty());
        assert!(!base.path().join(DIR).exists(), "a check changed something");
        leases.lease(&[first], &own("web"), || Ok(())).unwrap();
        let all = HostPort { address: Ipv4Addr::UNSPECIFIED, ..first };
        for port in [first, all] {
            // All or none.
            let error = leases.lease(&[second, port], &own("db"), || panic!("recorded")).unwrap_err().to_string();
            let expected = format!("the host's port {port} is in use by sandbox web in namespace ns (as {first})");
            assert_eq!(error, expected);
        }
        assert!(leases.taken(&[second], "db").unwrap().is_empty());
        // The sandbox itself may boot again.
        leases.lease(&[first], &own("web"), || Ok(())).unwrap();
        leases.release(&[first, second], own("web").shim).unwrap();
        leases.lease(&[all], &own("db"), || Ok(())).unwrap();
    }

    #[test]
    fn a_port_of_another_process_is_not_leased() {
        let base = tempfile::tempdir().unwrap();
        let leases = PortLeases::under(base.path());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = HostPort { port: listener.local_addr().unwrap().port(), ..free() };
        let error = leases.lease(&[port], &own("web"), || panic!("recorded")).unwrap_err().to_string();
        assert!(error.contains(&format!("(PID {})", std::process::id())), "{error}");
    }

    #[test]
    fn a_dead_shims_port_is_taken_over_and_its_cleanup_leaves_the_new_lease() {
        let base = tempfile::tempdir().unwrap();
        let leases = PortLeases::under(base.path());
        let port = free();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let dead = ProcessId::of(child.id()).unwrap().unwrap();
        leases.lease(&[port], &holder("old", dead), || Ok(())).unwrap();
        assert_eq!(leases.taken(&[port], "other").unwrap().len(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        leases.lease(&[port], &own("new"), || Ok(())).unwrap();
        leases.release(&[port], dead).unwrap();
        assert_eq!(leases.taken(&[port], "other").unwrap().len(), 1, "the new holder's lease was removed");
    }

    #[test]
    fn cleanup_after_a_killed_shim_releases_its_ports() {
        use crate::state::{Owner, State, Step};
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create(base.path(), "ns", "s1").unwrap();
        let (leases, ports, holder) = (state.port_leases(), vec![free()], own("s1"));
        let step = Step::Ports { ports: ports.clone(), leases: leases.clone(), shim: holder.shim };
        leases.lease(&ports, &holder, || state.record(&Owner::Sandbox, [step.clone()])).unwrap();
        assert_eq!(step.to_string(), format!("release the host's port {}", ports[0]));
        drop(state);
        State::load(base.path(), "ns", "s1").unwrap().undo_all(Duration::from_secs(1)).unwrap();
        assert!(leases.taken(&ports, "other").unwrap().is_empty());
    }
}
