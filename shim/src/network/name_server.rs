//! Whether a DNS server of the host listens in the namespace for the containers' queries: docker's does for
//! user-defined networks. It has a random port of 127.0.0.11, to which docker's firewall rules lead in the namespace.
//!
//! The containers' `resolv.conf` names the server too, but a container can change the file.

use std::fs::File;
use std::io::{self, Read, Seek};

use husk_protos::NAME_SERVER;

use super::error::ObjectError;

/// The UDP sockets of the namespace of the thread that opens the file: proc(5).
const SOCKETS: &str = "/proc/thread-self/net/udp";
/// Longest list that is read, bytes: 128 for each socket. Only programs of the host have sockets in the namespace.
const LIST: u64 = 1 << 20;

/// Looks for the server. Opened inside the namespace, it works from any thread.
pub(super) struct NameServer {
    sockets: File,
    listens: bool,
}

impl NameServer {
    /// Opens the list of the thread's network namespace.
    pub(super) fn open() -> Result<Self, ObjectError> {
        let sockets = File::open(SOCKETS).map_err(ObjectError::system("UDP sockets", "list them"))?;
        Ok(Self { sockets, listens: false })
    }

    /// Whether the server listened at the last look.
    pub(super) fn listens(&self) -> bool {
        self.listens
    }

    /// Looks for the server. Returns whether it was started or stopped since the last look.
    pub(super) fn look(&mut self) -> Result<bool, ObjectError> {
        let listens = self.read().map_err(ObjectError::system("UDP sockets", "list them"))?;
        Ok(std::mem::replace(&mut self.listens, listens) != listens)
    }

    fn read(&mut self) -> io::Result<bool> {
        let mut list = String::new();
        self.sockets.rewind()?;
        (&self.sockets).take(LIST).read_to_string(&mut list)?;
        Ok(list.lines().any(is_server))
    }
}

/// Whether a line describes a socket with the server's address. The kernel prints an address as a number of the
/// machine's byte order.
fn is_server(line: &str) -> bool {
    let local = line.split_whitespace().nth(1);
    let address = format!("{:08X}:", u32::from_ne_bytes(NAME_SERVER.ip().octets()));
    local.is_some_and(|local| local.starts_with(&address))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use super::*;
    use crate::network::netns::claim;
    use crate::network::testing::Namespace;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn the_server_is_found_while_it_listens_in_the_namespace() {
        let (namespace, other) = (Namespace::new(), Namespace::new());
        let bind = |namespace: &Namespace, address: &'static str| {
            claim(&namespace.path()).unwrap().run(LIMIT, move |_| Ok(UdpSocket::bind(address).unwrap())).unwrap()
        };
        let mut watched = claim(&namespace.path()).unwrap().run(LIMIT, |_| NameServer::open()).unwrap();
        let mut look = || (watched.look().unwrap(), watched.listens());
        let _others = [bind(&namespace, "127.0.0.1:53"), bind(&namespace, "0.0.0.0:0"), bind(&other, "127.0.0.11:0")];
        assert_eq!(look(), (false, false));
        let server = bind(&namespace, "127.0.0.11:0");
        assert_eq!([look(), look()], [(true, true), (false, true)]);
        drop(server);
        assert_eq!([look(), look()], [(true, false), (false, false)]);
    }
}
