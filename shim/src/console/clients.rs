//! Serves the console on `console.sock`. Each client receives the last 64 KiB and then new output; its input goes to
//! the guest's serial port, in debug mode to its shell. Bytes pass unchanged. A client that reads too slowly is dropped. One that shuts down its
//! sending side receives the output up to then and is disconnected.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};

use crate::console::record::Overrun;
use crate::console::serial::{Console, MachineEnd, SOCKET};
use crate::host::socket;

/// Most clients at a time. Each occupies one of the shim's descriptors, of which there are about a thousand.
const CLIENTS: usize = 64;
/// Bytes per write.
const PIECE: usize = 16 * 1024;

impl Console {
    /// Serves the console on `listener` for as long as the runtime runs.
    pub(crate) fn serve(&self, listener: UnixListener) {
        let console = self.clone();
        let reject = |_: &UnixStream| tracing::warn!(limit = CLIENTS, "rejected a console client: there are too many");
        socket::serve(listener, SOCKET, CLIENTS, reject, move |stream| {
            let console = console.clone();
            async move {
                if let Err(overrun) = console.serve_client(stream).await {
                    tracing::warn!(missed = overrun.missed, "dropped a console client that reads too slowly");
                }
            }
        });
    }

    /// Serves one client until it disconnects, reads too slowly, or has received all output of a machine that ended.
    async fn serve_client(&self, stream: UnixStream) -> Result<(), Overrun> {
        let (mut read, mut write) = stream.into_split();
        let mut at = self.record.replay();
        // The end of the output for a client that sends no more.
        let mut last = None;
        let mut typing = std::pin::pin!(self.forward_input(&mut read));
        loop {
            let piece = self.record.read(at, PIECE)?;
            if !piece.is_empty() {
                tokio::select! {
                    // Not write_all: cancelled by another branch, it would not report how much it wrote.
                    written = write.write(&piece) => match written {
                        Ok(length) => at += length as u64,
                        // The client disconnected.
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
                () = self.machine_ended() => if self.record.end() == at { return Ok(()) },
                () = &mut typing, if last.is_none() => last = Some(self.record.end()),
            }
        }
    }

    /// Forwards a client's input to the machine, at the machine's pace, until the client sends no more.
    async fn forward_input(&self, read: &mut OwnedReadHalf) {
        let mut buffer = [0; 1024];
        loop {
            let length = match read.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            let machine = match &*self.machine.borrow() {
                MachineEnd::Up(typed) => Some(typed.clone()),
                MachineEnd::Unused | MachineEnd::Ended => None,
            };
            // Input is discarded without a machine, or if it ends meanwhile.
            if let Some(machine) = machine {
                let _ = machine.send(buffer[..length].to_vec()).await;
            }
        }
    }

    /// Waits until the machine has ended. Before the first machine, waits for that one's end.
    async fn machine_ended(&self) {
        // self owns the sender, so this cannot fail.
        let _ = self.machine.subscribe().wait_for(|machine| matches!(machine, MachineEnd::Ended)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
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

        /// Attaches a machine and returns its end.
        fn machine(&self) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.console.attach(ours, None);
            theirs
        }

        /// Writes as the machine and waits until the output is recorded.
        async fn write(&self, machine: &mut UnixStream, bytes: &[u8]) {
            let end = self.console.record().end() + bytes.len() as u64;
            machine.write_all(bytes).await.unwrap();
            tokio::time::timeout(LONG, self.console.record().grown(end - 1)).await.expect("recorded in time");
        }
    }

    async fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        tokio::time::timeout(LONG, stream.read_exact(&mut bytes)).await.expect("in time").unwrap();
        bytes
    }

    async fn rest(stream: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Closed with unread data, a connection ends with an error.
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("the end in time");
        bytes
    }

    #[tokio::test]
    async fn each_client_gets_the_last_64_kib_and_then_new_output() {
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
        // The machine's end ends the output, also for later clients.
        drop(machine);
        for client in [&mut early, &mut late] {
            assert_eq!(rest(client).await, b"");
        }
        assert_eq!(rest(&mut served.client().await).await.len(), REPLAY);
    }

    #[tokio::test]
    async fn input_reaches_the_guest_and_a_guest_that_reads_none_stalls_nothing_else() {
        let served = Served::new();
        let mut machine = served.machine();
        let (mut one, mut other) = (served.client().await, served.client().await);
        one.write_all(b"one\n").await.unwrap();
        assert_eq!(read(&mut machine, 4).await, b"one\n");
        other.write_all(b"other\n").await.unwrap();
        assert_eq!(read(&mut machine, 6).await, b"other\n");
        // Far more than all queues hold, and the guest reads none of it.
        let flood = tokio::spawn(async move { one.write_all(&vec![b'x'; 8 << 20]).await });
        served.write(&mut machine, b"still there").await;
        assert_eq!(read(&mut other, 11).await, b"still there");
        assert!(!flood.is_finished(), "8 MiB of unread input are buffered somewhere");
        drop(machine);
        assert_eq!(rest(&mut other).await, b"");
        flood.abort();
    }

    #[tokio::test]
    async fn a_slow_client_is_dropped_and_delays_nothing() {
        let served = Served::new();
        let mut machine = served.machine();
        let mut slow = served.client().await;
        let mut quick = served.client().await;
        let piece = vec![b'x'; 64 * 1024];
        for _ in 0..64 {
            served.write(&mut machine, &piece).await;
            assert_eq!(read(&mut quick, piece.len()).await.len(), piece.len());
        }
        // The slow client gets what its socket buffered, and then the end. The console continues.
        assert!(rest(&mut slow).await.len() < 64 * piece.len());
        served.write(&mut machine, b"on").await;
        assert_eq!(read(&mut quick, 2).await, b"on");
    }

    #[tokio::test]
    async fn a_client_that_shuts_down_its_sending_side_gets_the_output_so_far() {
        let served = Served::new();
        let mut machine = served.machine();
        served.write(&mut machine, b"so far").await;
        let mut client = served.client().await;
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut client).await, b"so far");
    }

    #[tokio::test]
    async fn clients_beyond_the_limit_are_rejected() {
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
