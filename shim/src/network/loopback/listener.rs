//! The sockets in the namespace, for each address family.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::sockopt::{Ip6tOriginalDst, IpFreebind, OriginalDst};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, getsockopt, listen as listen_with,
    setsockopt, socket,
};

use crate::network::error::ObjectError;

/// Attempts to find a port that is free for both families. In the namespace of a pod, nearly all are.
const ATTEMPTS: usize = 16;

/// The sockets of one address family.
pub(super) struct Listeners {
    pub(super) stream: TcpListener,
    /// Not for connections.
    pub(super) datagram: Option<UdpSocket>,
}

/// Listens on one port of both loopback addresses, in the thread's network namespace, and returns the port. There is
/// one family if the kernel has no IPv6.
pub(super) fn listen(datagrams: bool) -> Result<(Vec<Listeners>, u16), ObjectError> {
    let failed = || ObjectError::system("loopback", "listen for connections to the VM");
    for attempt in 1.. {
        match listen_once(datagrams) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempt < ATTEMPTS => {}
            result => return result.map_err(failed()),
        }
    }
    Err(failed()(io::ErrorKind::AddrInUse.into()))
}

fn listen_once(datagrams: bool) -> io::Result<(Vec<Listeners>, u16)> {
    let v4 = listen_at((Ipv4Addr::LOCALHOST, 0).into(), datagrams)?;
    let port = v4.stream.local_addr()?.port();
    match listen_at((Ipv6Addr::LOCALHOST, port).into(), datagrams) {
        Ok(v6) => Ok((vec![v4, v6], port)),
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok((vec![v4], port)),
        Err(error) => Err(error),
    }
}

fn listen_at(address: SocketAddr, datagrams: bool) -> io::Result<Listeners> {
    let stream = bind_at(address, SockType::Stream, SockProtocol::Tcp)?;
    listen_with(&stream, Backlog::MAXALLOWABLE)?;
    let stream = TcpListener::from(stream);
    let address = SocketAddr::new(address.ip(), stream.local_addr()?.port());
    let datagram = if datagrams { Some(bind_at(address, SockType::Datagram, SockProtocol::Udp)?.into()) } else { None };
    Ok(Listeners { stream, datagram })
}

fn bind_at(address: SocketAddr, kind: SockType, protocol: SockProtocol) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
    // `lo` may be down, and has no addresses then.
    setsockopt(&socket, IpFreebind, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
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
