//! `console.sock`: any number of clients (up to a limit) each get the last 64 KiB and then what comes, and what they send is typed into the guest's
//! serial port. The bytes are the guest's as they are. A client that is too slow is dropped, and one that sends no more leaves with what was there.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};

use crate::console::record::Overrun;
use crate::console::{Console, Line};
use crate::host::socket;

/// Clients at once. Each holds a descriptor, of which the shim has some thousand.
const CLIENTS: usize = 64;
/// Bytes that are written at once.
const PIECE: usize = 16 * 1024;

impl Console {
    /// Serves it to whoever connects, as long as the runtime runs.
    pub fn serve(&self, listener: UnixListener) {
        let console = self.clone();
        let turn_away = |_: &UnixStream| {
            tracing::warn!(clients = CLIENTS, "a client of the console is turned away: there are too many");
        };
        socket::serve(listener, crate::console::SOCKET, CLIENTS, turn_away, move |stream| {
            let console = console.clone();
            async move {
                if let Err(slow) = console.attend(stream).await {
                    tracing::warn!(%slow, "a client of the console is dropped");
                }
            }
        });
    }

    /// Serves one client until it leaves, is too slow, or the machine's output has ended.
    async fn attend(&self, stream: UnixStream) -> Result<(), Overrun> {
        let (mut read, mut write) = stream.into_split();
        let mut at = self.record.replay();
        let mut last = None;
        let mut typing = std::pin::pin!(self.take_input(&mut read));
        loop {
            let piece = self.record.read(at, PIECE)?;
            if !piece.is_empty() {
                tokio::select! {
                    // Not all of it at once: what was written before another branch is taken would not be known.
                    written = write.write(&piece) => match written {
                        Ok(length) => at += length as u64,
                        // It has gone.
                        Err(_) => return Ok(()),
                    },
                    () = self.record.overrun(at) => {
                        return Err(Overrun { missed: self.record.end() - at });
                    }
                    () = &mut typing, if last.is_none() => last = Some(self.record.end()),
                }
                continue;
            }
            if last.is_some_and(|last| at >= last) {
                return Ok(());
            }
            tokio::select! {
                () = self.record.grown(at) => {}
                () = self.ended() => if self.record.end() == at { return Ok(()) },
                () = &mut typing, if last.is_none() => last = Some(self.record.end()),
            }
        }
    }

    /// Gives what the client sends to the machine, at the machine's pace; ends when the client sends no more.
    async fn take_input(&self, read: &mut OwnedReadHalf) {
        let mut buffer = [0; 1024];
        loop {
            let length = match read.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            let to = match &*self.line.borrow() {
                Line::Up(typed) => Some(typed.clone()),
                Line::Unused | Line::Ended => None,
            };
            // Without a machine, or when it goes meanwhile, nobody is there to read it.
            if let Some(to) = to {
                let _ = to.send(buffer[..length].to_vec()).await;
            }
        }
    }

    /// Waits until there is no machine any more; not for the first one to come.
    async fn ended(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.line.subscribe().wait_for(|line| matches!(line, Line::Ended)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::console::SOCKET;
    use crate::console::record::REPLAY;

    const LONG: Duration = Duration::from_secs(20);

    struct Served {
        dir: tempfile::TempDir,
        console: Console,
    }

    impl Served {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let console = Console::new(dir.path());
            console.serve(UnixListener::from_std(crate::host::socket::listen(dir.path(), SOCKET).unwrap()).unwrap());
            Self { dir, console }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join(SOCKET)
        }

        async fn client(&self) -> UnixStream {
            UnixStream::connect(self.path()).await.unwrap()
        }

        /// The machine's end of a console.
        fn machine(&self) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.console.attach(ours);
            theirs
        }

        /// Writes as the machine, and waits until that is recorded.
        async fn write(&self, machine: &mut UnixStream, bytes: &[u8]) {
            let end = self.console.record().end() + bytes.len() as u64;
            machine.write_all(bytes).await.unwrap();
            tokio::time::timeout(LONG, self.console.record().grown(end - 1)).await.expect("recorded");
        }
    }

    async fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        tokio::time::timeout(LONG, stream.read_exact(&mut bytes)).await.expect("in time").unwrap();
        bytes
    }

    async fn rest(stream: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A connection that was closed with something unread ends with an error.
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("the end in time");
        bytes
    }

    #[tokio::test]
    async fn each_client_gets_the_last_64_kib_and_then_what_comes() {
        let served = Served::new();
        let mut early = served.client().await;
        let mut machine = served.machine();
        let long: Vec<u8> = (0..REPLAY + 10_000).map(|n| b'a' + (n % 23) as u8).collect();
        served.write(&mut machine, &long).await;
        assert_eq!(read(&mut early, long.len()).await, long);
        let mut late = served.client().await;
        assert_eq!(read(&mut late, REPLAY).await, long[long.len() - REPLAY..]);
        served.write(&mut machine, b"live").await;
        for client in [&mut early, &mut late] {
            assert_eq!(read(client, 4).await, b"live");
        }
        // With the machine the output ends, also for those who come later.
        drop(machine);
        for client in [&mut early, &mut late] {
            assert_eq!(rest(client).await, b"");
        }
        assert_eq!(rest(&mut served.client().await).await.len(), REPLAY);
    }

    #[tokio::test]
    async fn what_clients_send_is_typed_and_a_guest_that_does_not_read_holds_nothing_up() {
        let served = Served::new();
        let mut machine = served.machine();
        let (mut one, mut other) = (served.client().await, served.client().await);
        one.write_all(b"one\n").await.unwrap();
        assert_eq!(read(&mut machine, 4).await, b"one\n");
        other.write_all(b"other\n").await.unwrap();
        assert_eq!(read(&mut machine, 6).await, b"other\n");
        // Far more than all queues hold, and nobody reads it.
        let flood = tokio::spawn(async move { one.write_all(&vec![b'x'; 8 << 20]).await });
        served.write(&mut machine, b"still there").await;
        assert_eq!(read(&mut other, 11).await, b"still there");
        assert!(!flood.is_finished(), "8 MiB that nobody reads are kept somewhere");
        drop(machine);
        assert_eq!(rest(&mut other).await, b"");
        flood.abort();
    }

    #[tokio::test]
    async fn a_slow_client_is_dropped_and_not_waited_for() {
        let served = Served::new();
        let mut machine = served.machine();
        let mut slow = served.client().await;
        let mut quick = served.client().await;
        let piece = vec![b'x'; 64 * 1024];
        for _ in 0..64 {
            served.write(&mut machine, &piece).await;
            assert_eq!(read(&mut quick, piece.len()).await.len(), piece.len());
        }
        // It gets what was on its way to it, and then the end, while the console goes on.
        assert!(rest(&mut slow).await.len() < 64 * piece.len());
        served.write(&mut machine, b"on").await;
        assert_eq!(read(&mut quick, 2).await, b"on");
    }

    #[tokio::test]
    async fn a_client_that_sends_no_more_leaves_with_what_was_there() {
        let served = Served::new();
        let mut machine = served.machine();
        served.write(&mut machine, b"so far").await;
        let mut client = served.client().await;
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut client).await, b"so far");
    }

    #[tokio::test]
    async fn clients_beyond_the_limit_are_turned_away() {
        let served = Served::new();
        let mut machine = served.machine();
        served.write(&mut machine, b"x").await;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let mut client = served.client().await;
            assert_eq!(read(&mut client, 1).await, b"x");
            clients.push(client);
        }
        assert_eq!(rest(&mut served.client().await).await, b"");
    }
}
