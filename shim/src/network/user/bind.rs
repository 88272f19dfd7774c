//! Whether the VMM's process will be able to bind a port of the host, and which process has the port otherwise.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use procfs::ProcResult;
use procfs::net::TcpState;
use procfs::process::{FDTarget, all_processes};

use super::port::{HostPort, Protocol};

/// The lowest port that needs no privilege (ip-sysctl.rst).
const UNPRIVILEGED: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Why a port cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process has it.
    #[error("the host's port {port} is in use by {owner}")]
    InUse {
        /// The port.
        port: HostPort,
        /// Who has it.
        owner: Owner,
    },
    /// Only privileged processes may bind it.
    #[error(
        "the host's port {port} is below net.ipv4.ip_unprivileged_port_start = {first}, and the VMM runs as an \
         unprivileged user: use a port from {first}, or lower the sysctl on the host"
    )]
    Privileged {
        /// The port.
        port: HostPort,
        /// The lowest port that needs no privilege.
        first: u16,
    },
    /// The address belongs to another host.
    #[error("the host's port {port}: {} is not an address of this host", port.address)]
    NotOfHost {
        /// The port.
        port: HostPort,
    },
    /// Another error of the system.
    #[error("bind the host's port {port}")]
    System {
        /// The port.
        port: HostPort,
        /// The system's error.
        source: io::Error,
    },
}

/// The owner of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A process of the host.
    Process {
        /// Its name.
        name: String,
        /// Its PID.
        pid: i32,
    },
    /// No process that is visible here has the port's socket open.
    Unknown,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // A process can give itself any name.
            Self::Process { name, pid } => write!(f, "{} (PID {pid})", name.escape_debug()),
            Self::Unknown => f.write_str("a process that is not visible in the shim's PID namespace"),
        }
    }
}

impl HostPort {
    /// Checks that an unprivileged process could bind the port now. Opens it for a moment.
    ///
    /// # Errors
    /// [`BindError`].
    pub(crate) fn check(&self) -> Result<(), BindError> {
        let system = |source| BindError::System { port: *self, source };
        let first = first_unprivileged().map_err(system)?;
        if self.port < first {
            return Err(BindError::Privileged { port: *self, first });
        }
        let address = SocketAddr::new(self.address.into(), self.port);
        let bound = match self.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        bound.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { port: *self, owner: self.owner() },
            io::ErrorKind::AddrNotAvailable => BindError::NotOfHost { port: *self },
            _ => system(source),
        })
    }

    /// The process that has the port. It may have ended meanwhile, or run in another PID namespace.
    fn owner(&self) -> Owner {
        let found = self.sockets().and_then(|sockets| process_with(&sockets));
        found.unwrap_or_else(|error| {
            tracing::debug!(port = %self, %error, "failed to find the owner of a port");
            Owner::Unknown
        })
    }

    /// The inodes of the sockets that have the port.
    fn sockets(&self) -> ProcResult<Vec<u64>> {
        let ours = |local: SocketAddr| local.port() == self.port && shares(self.address, local.ip());
        Ok(match self.protocol {
            Protocol::Tcp => {
                let all = procfs::net::tcp()?.into_iter().chain(procfs::net::tcp6()?);
                let listening = all.filter(|entry| entry.state == TcpState::Listen && ours(entry.local_address));
                listening.map(|entry| entry.inode).collect()
            }
            Protocol::Udp => {
                let all = procfs::net::udp()?.into_iter().chain(procfs::net::udp6()?);
                all.filter(|entry| ours(entry.local_address)).map(|entry| entry.inode).collect()
            }
        })
    }
}

fn first_unprivileged() -> io::Result<u16> {
    fs::read_to_string(UNPRIVILEGED)?.trim().parse().map_err(io::Error::other)
}

/// Whether a socket with this local address takes connections to `address`. An IPv6 socket for all addresses usually
/// takes IPv4 too.
fn shares(address: Ipv4Addr, local: IpAddr) -> bool {
    match local.to_canonical() {
        IpAddr::V4(local) => address.is_unspecified() || local.is_unspecified() || address == local,
        IpAddr::V6(local) => local.is_unspecified(),
    }
}

fn process_with(sockets: &[u64]) -> ProcResult<Owner> {
    for process in all_processes()? {
        // A process may end at any time.
        let Ok(process) = process else { continue };
        let Ok(fds) = process.fd() else { continue };
        let has = |target: FDTarget| matches!(target, FDTarget::Socket(inode) if sockets.contains(&inode));
        if fds.flatten().any(|fd| has(fd.target))
            && let Ok(stat) = process.stat()
        {
            return Ok(Owner::Process { name: stat.comm, pid: process.pid });
        }
    }
    Ok(Owner::Unknown)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn own_name() -> String {
        procfs::process::Process::myself().unwrap().stat().unwrap().comm
    }

    #[test]
    fn a_port_in_use_names_its_owner_and_is_free_afterwards() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        let tcp6 = TcpListener::bind("[::]:0").unwrap();
        let owner = format!("is in use by {} (PID {})", own_name(), std::process::id());
        let ports = [
            (Protocol::Tcp, "127.0.0.1", tcp.local_addr().unwrap().port()),
            (Protocol::Tcp, "0.0.0.0", tcp.local_addr().unwrap().port()),
            (Protocol::Udp, "127.0.0.1", udp.local_addr().unwrap().port()),
            (Protocol::Tcp, "127.0.0.1", tcp6.local_addr().unwrap().port()),
        ]
        .map(|(protocol, address, port)| HostPort { protocol, address: address.parse().unwrap(), port });
        for port in ports {
            let error = port.check().unwrap_err().to_string();
            assert_eq!(error, format!("the host's port {port} {owner}"));
        }
        drop((tcp, udp, tcp6));
        // A child that another test has forked holds the sockets until it executes its program.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = ports.iter().try_for_each(HostPort::check) {
            assert!(Instant::now() < deadline, "{error}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_port_that_an_unprivileged_process_cannot_bind_is_named() {
        let port = |address: &str, port| HostPort { protocol: Protocol::Tcp, address: address.parse().unwrap(), port };
        let first = first_unprivileged().unwrap();
        if first > 0 {
            let error = port("127.0.0.1", first - 1).check().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{}/tcp is below net.ipv4.ip_unprivileged_port_start", first - 1)),
                "{error}"
            );
        }
        // TEST-NET-1 (RFC 5737).
        let error = port("192.0.2.1", 18080).check().unwrap_err().to_string();
        assert_eq!(error, "the host's port 192.0.2.1:18080/tcp: 192.0.2.1 is not an address of this host");
    }

    #[test]
    fn a_name_cannot_forge_a_message() {
        let owner = Owner::Process { name: "a\nb\u{1b}".into(), pid: 7 };
        assert_eq!(owner.to_string(), "a\\nb\\u{1b} (PID 7)");
    }
}
