//! The listeners in the namespace, one for each address family.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::sockopt::{Ip6tOriginalDst, IpFreebind, OriginalDst};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, getsockopt, listen as listen_with,
    setsockopt, socket,
};

use crate::network::error::ObjectError;

/// Attempts to find a port that is free for both families. In the namespace of a pod, nearly all are.
const ATTEMPTS: usize = 16;

/// Listens on one port of both loopback addresses, in the thread's network namespace, and returns the port. There is
/// one listener if the kernel has no IPv6.
pub(super) fn listen() -> Result<(Vec<TcpListener>, u16), ObjectError> {
    let failed = || ObjectError::system("loopback", "listen for connections to the VM");
    let mut attempt = 0;
    loop {
        attempt += 1;
        let v4 = listen_at((Ipv4Addr::LOCALHOST, 0).into()).map_err(failed())?;
        let port = v4.local_addr().map_err(failed())?.port();
        match listen_at((Ipv6Addr::LOCALHOST, port).into()) {
            Ok(v6) => return Ok((vec![v4, v6], port)),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok((vec![v4], port)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS => {}
            Err(error) => return Err(failed()(error)),
        }
    }
}

fn listen_at(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(family, SockType::Stream, flags, SockProtocol::Tcp)?;
    // `lo` may be down, and has no addresses then.
    setsockopt(&listener, IpFreebind, &true)?;
    bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen_with(&listener, Backlog::MAXALLOWABLE)?;
    Ok(listener.into())
}

/// The address that a client of one of the listeners meant.
///
/// # Errors
///
/// The kernel does not know the connection.
pub(crate) fn original_destination(client: &impl AsFd, local: SocketAddr) -> io::Result<SocketAddr> {
    Ok(match local {
        SocketAddr::V4(_) => {
            let meant = getsockopt(client, OriginalDst)?;
            let address = Ipv4Addr::from(u32::from_be(meant.sin_addr.s_addr));
            (address, u16::from_be(meant.sin_port)).into()
        }
        SocketAddr::V6(_) => {
            let meant = getsockopt(client, Ip6tOriginalDst)?;
            (Ipv6Addr::from(meant.sin6_addr.s6_addr), u16::from_be(meant.sin6_port)).into()
        }
    })
}
