//! The shim's vsock device against a real guest kernel: `vsock-peer` is the VM's only program.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::pattern;
use husk_tests::vm::{MachineType, Vm, guest_program};
use husk_vsock::{Device, Listener, VsockError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

const COMMANDS: u32 = 100;
const READY: u32 = 99;
/// Seeds of the bytes that the guest sends, and of those that it expects.
const GUESTS: u64 = 1;
const HOSTS: u64 = 2;
/// Deadline for a single step of a test, on a loaded machine that emulates its guest.
const STEP: Duration = Duration::from_secs(60);
const GIB: u64 = 1 << 30;

/// Only one VM at a time: the tests count this process's descriptors and device threads, and measure times.
static VM_LOCK: Mutex<()> = Mutex::const_new(());

struct Guest {
    device: Device,
    vm: Vm,
    _vm_lock: MutexGuard<'static, ()>,
}

impl Guest {
    async fn boot() -> Result<Guest> {
        Self::boot_on(MachineType::Microvm).await
    }

    async fn boot_on(machine: MachineType) -> Result<Guest> {
        let init = spawn_blocking(|| guest_program("vsock-peer")).await??;
        let vm_lock = VM_LOCK.lock().await;
        let (device, qemus_end) = Device::start(3)?;
        let mut ready = device.listen(READY)?;
        let vm = Vm::boot(machine, &init, qemus_end)?;
        let guest = Guest { device, vm, _vm_lock: vm_lock };
        match timeout(STEP, ready.accept()).await {
            Ok(Ok(_)) => Ok(guest),
            other => anyhow::bail!("the guest did not boot ({other:?}); console:\n{}", guest.vm.console()),
        }
    }

    /// Sends a request line; `vsock-peer` lists them.
    async fn request(&self, line: &str) -> Result<UnixStream> {
        let mut stream = self.device.connect(COMMANDS, STEP).await?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(stream)
    }

    async fn request_blocking(&self, line: &str) -> Result<StdStream> {
        blocking(self.request(line).await?)
    }

    /// Makes the guest connect to a port that the test listens on, and execute `line` there.
    async fn accept_from(&self, listener: &mut Listener, port: u32, line: &str) -> Result<UnixStream> {
        let mut response = BufReader::new(self.request(&format!("dial {port} {line}")).await?);
        let stream = timeout(STEP, listener.accept()).await.context("the guest did not connect")??;
        ensure!(read_line(&mut response).await? == "ok");
        Ok(stream)
    }
}

fn blocking(stream: UnixStream) -> Result<StdStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

async fn read_line(stream: &mut BufReader<UnixStream>) -> Result<String> {
    let mut line = String::new();
    timeout(STEP, stream.read_line(&mut line)).await.context("no response")??;
    Ok(line.trim_end().to_owned())
}

async fn echo(guest: &Guest, text: &str) -> Result<String> {
    let mut stream = guest.request("echo").await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    let mut back = String::new();
    timeout(STEP, stream.read_to_string(&mut back)).await.context("no echo")??;
    Ok(back)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_write_in_the_guest_arrives_completely() -> Result<()> {
    for machine in [MachineType::Microvm, MachineType::Q35] {
        let guest = Guest::boot_on(machine).await?;
        for size in [1, 4095, 4096, 65536, 65537, 1 << 20, 5 << 20] {
            let mut stream = guest.request_blocking(&format!("source {size} {size}")).await?;
            let received = timeout(STEP, spawn_blocking(move || pattern::check(&mut stream, GUESTS, u64::MAX)))
                .await
                .with_context(|| format!("a write of {size} bytes on {machine:?} stalls"))??;
            assert_eq!(received?, size, "{machine:?}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_in_both_directions_at_once_arrives_unchanged() -> Result<()> {
    let guest = Guest::boot().await?;
    let start = Instant::now();
    let mut stream = guest.request_blocking(&format!("duplex {GIB} 65536")).await?;
    let mut writer = stream.try_clone()?;
    let writing = spawn_blocking(move || -> Result<()> {
        pattern::write(&mut writer, HOSTS, GIB, 65536)?;
        Ok(writer.shutdown(std::net::Shutdown::Write)?)
    });
    let reading = spawn_blocking(move || -> Result<String> {
        assert_eq!(pattern::check(&mut stream, GUESTS, GIB)?, GIB);
        let mut rest = String::new();
        stream.read_to_string(&mut rest)?;
        Ok(rest)
    });
    writing.await??;
    assert_eq!(reading.await??.trim_end(), GIB.to_string());
    report("both directions at once", 2 * GIB, start);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn throughput_in_each_direction_is_reported() -> Result<()> {
    let guest = Guest::boot().await?;
    for block in [4096, 65536, 1 << 20] {
        let total = GIB / 4;
        let start = Instant::now();
        let mut stream = guest.request_blocking(&format!("source {total} {block}")).await?;
        assert_eq!(spawn_blocking(move || pattern::check(&mut stream, GUESTS, u64::MAX)).await??, total);
        report(&format!("guest to host, writes of {block}"), total, start);

        let start = Instant::now();
        let mut stream = guest.request_blocking("sink").await?;
        let response = spawn_blocking(move || -> Result<String> {
            pattern::write(&mut stream, HOSTS, total, block)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut response = String::new();
            stream.read_to_string(&mut response)?;
            Ok(response)
        });
        assert_eq!(response.await??.trim_end(), total.to_string());
        report(&format!("host to guest, writes of {block}"), total, start);
    }
    Ok(())
}

fn report(what: &str, bytes: u64, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("{what}: {:.0} MB/s", bytes as f64 / 1e6 / seconds);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_leave_no_descriptors() -> Result<()> {
    let guest = Guest::boot().await?;
    let before = open_fds()?;
    for round in 0..10 {
        let echoes = (0..50).map(|n| {
            let (guest, text) = (&guest, format!("{round} {n}"));
            async move { anyhow::Ok((echo(guest, &text).await?, text)) }
        });
        for result in join_all(echoes).await {
            let (received, sent) = result?;
            assert_eq!(received, sent);
        }
    }
    let mut listener = guest.device.listen(2000)?;
    for n in 0..500 {
        let mut stream = guest.accept_from(&mut listener, 2000, "echo").await?;
        stream.write_all(b"x").await?;
        let mut byte = [0];
        timeout(STEP, stream.read_exact(&mut byte)).await.with_context(|| format!("no echo on connection {n}"))??;
        // Half of the connections are shut down in order, half are just dropped.
        if n % 2 == 0 {
            stream.shutdown().await?;
            assert_eq!(timeout(STEP, stream.read(&mut byte)).await??, 0);
        }
    }
    // The last connections may still be closing.
    let end = Instant::now() + STEP;
    while open_fds()? > before {
        ensure!(Instant::now() < end, "{} descriptors are open, {before} before", open_fds()?);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn open_fds() -> Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

async fn join_all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    let mut done = Vec::new();
    std::future::poll_fn(|context| {
        pending.retain_mut(|future| match future.as_mut().poll(context) {
            std::task::Poll::Ready(value) => {
                done.push(value);
                false
            }
            std::task::Poll::Pending => true,
        });
        if pending.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_peer_delays_no_other_stream() -> Result<()> {
    let guest = Guest::boot().await?;
    // This stream is not read in the guest: the host can send only what the buffers on the way hold.
    let mut unread = BufReader::new(guest.request("stall").await?);
    assert_eq!(read_line(&mut unread).await?, "ok");
    let source = pattern::Pattern::new(HOSTS, 65536);
    let mut sent = 0;
    while let Ok(n) = timeout(Duration::from_millis(500), unread.write(source.at(sent, 65536))).await {
        sent += n? as u64;
        ensure!(sent < 16 << 20, "a guest that does not read accepted {sent} bytes");
    }
    // This stream is not read on the host.
    let unread_source = guest.request(&format!("source {} 65536", 8 << 20)).await?;
    for n in 0..20 {
        let text = format!("still here {n}").repeat(1000);
        assert_eq!(timeout(STEP, echo(&guest, &text)).await.context("others stall too")??, text);
    }
    // Both streams continue where they stopped.
    assert_eq!(read_line(&mut BufReader::new(guest.request("release").await?)).await?, "ok");
    unread.shutdown().await?;
    assert_eq!(read_line(&mut unread).await?, sent.to_string());
    let mut unread_source = blocking(unread_source)?;
    let received = spawn_blocking(move || pattern::check(&mut unread_source, GUESTS, u64::MAX)).await??;
    assert_eq!(received, 8 << 20);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_in_the_guest_ends_its_streams() -> Result<()> {
    let guest = Guest::boot().await?;
    let mut listener = guest.device.listen(2000)?;
    for _ in 0..10 {
        let mut status = BufReader::new(guest.request("die 2000").await?);
        let mut stream = timeout(STEP, listener.accept()).await??;
        let mut received = String::new();
        timeout(STEP, stream.read_to_string(&mut received)).await.context("the stream does not end")??;
        assert_eq!(received, "last words");
        assert!(read_line(&mut status).await?.contains("signal"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vms_death_ends_all_streams_at_once() -> Result<()> {
    let mut guest = Guest::boot().await?;
    let mut listener = guest.device.listen(2000)?;
    let mut open = guest.request("echo").await?;
    open.write_all(b"x").await?;
    open.read_exact(&mut [0]).await?;
    let killed = Instant::now();
    guest.vm.kill()?;
    timeout(STEP, guest.device.closed()).await.context("closed() does not resolve")?;
    match timeout(STEP, open.read(&mut [0])).await.context("the stream does not end")? {
        Ok(n) => assert_eq!(n, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    assert!(matches!(listener.accept().await, Err(VsockError::Closed)));
    assert!(matches!(guest.device.connect(COMMANDS, STEP).await, Err(VsockError::Closed)));
    assert!(matches!(guest.device.listen(2001), Err(VsockError::Closed)));
    eprintln!("all streams ended {:?} after the VM's death", killed.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_sent_before_the_vms_end_arrive() -> Result<()> {
    // More than a stream's buffers hold, less than those and the device's together.
    let sent = 300_000;
    for crash in [true, false] {
        let mut guest = Guest::boot().await?;
        let mut listener = guest.device.listen(2000)?;
        let stream = guest.request(&format!("send {sent} 2000")).await?;
        // Packets keep their order: once this connection arrives, the bytes before it have arrived.
        timeout(STEP, listener.accept()).await.context("the guest cannot send its bytes")??;
        if crash {
            guest.vm.kill()?;
        } else {
            guest.request("off").await?;
            guest.vm.wait(STEP)?;
        }
        timeout(STEP, guest.device.closed()).await.context("closed() does not resolve")?;
        drop(guest);
        let mut stream = blocking(stream)?;
        let received = spawn_blocking(move || pattern::check(&mut stream, GUESTS, u64::MAX)).await??;
        assert_eq!(received, sent, "crash: {crash}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn half_closes_work_in_both_directions() -> Result<()> {
    let guest = Guest::boot().await?;
    // The host shuts down sending; the guest's response still arrives.
    let mut sink = BufReader::new(guest.request("sink").await?);
    sink.write_all(pattern::Pattern::new(HOSTS, 100_000).at(0, 100_000)).await?;
    sink.shutdown().await?;
    assert_eq!(read_line(&mut sink).await?, "100000");
    // The guest shuts down sending; the host's bytes still arrive.
    let mut listener = guest.device.listen(2000)?;
    let mut source = guest.accept_from(&mut listener, 2000, "source 10 10").await?;
    let mut bytes = Vec::new();
    timeout(STEP, source.read_to_end(&mut bytes)).await.context("the stream does not end")??;
    assert_eq!(bytes, pattern::Pattern::new(GUESTS, 10).at(0, 10));
    source.write_all(b"x").await.context("the host can't send after the guest's end of file")?;
    drop(source);
    // The guest shuts down receiving; the host's writes fail, and the guest can still send.
    let mut write_only = BufReader::new(guest.request("shut-read").await?);
    assert_eq!(read_line(&mut write_only).await?, "ok");
    let write_error = timeout(STEP, async {
        loop {
            if let Err(error) = write_only.write_all(&[0; 4096]).await {
                break error;
            }
        }
    });
    assert_eq!(write_error.await?.kind(), ErrorKind::BrokenPipe);
    assert_eq!(read_line(&mut BufReader::new(guest.request("release").await?)).await?, "ok");
    assert_eq!(read_line(&mut write_only).await?, "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_written_before_a_stream_is_dropped_arrive() -> Result<()> {
    let guest = Guest::boot().await?;
    let mut listener = guest.device.listen(2000)?;
    for _ in 0..20 {
        let mut first = guest.accept_from(&mut listener, 2000, "dial 2000 sink").await?;
        let mut second = timeout(STEP, listener.accept()).await??;
        // The "ok" of the dial request on the first stream.
        first.read_exact(&mut [0; 3]).await?;
        second.write_all(pattern::Pattern::new(HOSTS, 150_000).at(0, 150_000)).await?;
        drop(second);
    }
    assert_eq!(read_line(&mut BufReader::new(guest.request("tally 20").await?)).await?, (20 * 150_000).to_string());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_without_a_listener_refuse() -> Result<()> {
    let guest = Guest::boot().await?;
    // A refusal that is not immediate is a timeout.
    assert!(matches!(guest.device.connect(12345, STEP).await, Err(VsockError::Refused(12345))));
    let mut response = BufReader::new(guest.request("dial 12345 echo").await?);
    assert_eq!(read_line(&mut response).await?, format!("error {}", libc::ECONNRESET));
    let listener = guest.device.listen(12345)?;
    assert!(matches!(guest.device.listen(12345), Err(VsockError::PortInUse(12345))));
    drop(listener);
    let mut response = BufReader::new(guest.request("dial 12345 echo").await?);
    assert_eq!(read_line(&mut response).await?, format!("error {}", libc::ECONNRESET));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_continues_without_losing_bytes() -> Result<()> {
    let guest = Guest::boot().await?;
    let total = 64 << 20;
    let mut stream = guest.request_blocking(&format!("source {total} 65536")).await?;
    let reading = spawn_blocking(move || pattern::check(&mut stream, GUESTS, u64::MAX));
    let mut sink = guest.request_blocking("sink").await?;
    let writing = spawn_blocking(move || -> Result<String> {
        pattern::write(&mut sink, HOSTS, total, 65536)?;
        sink.shutdown(std::net::Shutdown::Write)?;
        let mut response = String::new();
        sink.read_to_string(&mut response)?;
        Ok(response)
    });
    for _ in 0..10 {
        guest.vm.qmp(&["stop", "cont"])?;
    }
    assert_eq!(timeout(STEP, reading).await.context("the reader stalls after a pause")???, total);
    assert_eq!(
        timeout(STEP, writing).await.context("the writer stalls after a pause")???.trim_end(),
        total.to_string()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn round_trip_times_are_reported_and_an_idle_device_sleeps() -> Result<()> {
    let guest = Guest::boot().await?;
    let mut stream = guest.request_blocking("echo").await?;
    let mut times = spawn_blocking(move || -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        for _ in 0..2000 {
            let start = Instant::now();
            stream.write_all(b"ping")?;
            stream.read_exact(&mut [0; 4])?;
            times.push(start.elapsed());
        }
        Ok(times)
    })
    .await??;
    times.sort();
    eprintln!("round trip: p50 {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100]);

    let open = guest.request("stall").await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = switches()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let after = switches()?;
    assert_eq!(before, after, "the idle device's thread wakes up");
    drop(open);
    Ok(())
}

/// The context switches of this process's device threads.
fn switches() -> Result<Vec<String>> {
    let mut switches = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        if status.starts_with("Name:\tvsock\n") {
            switches.extend(status.lines().filter(|line| line.contains("ctxt_switches")).map(str::to_owned));
        }
    }
    ensure!(!switches.is_empty(), "there is no device thread");
    Ok(switches)
}

#[tokio::test(flavor = "multi_thread")]
async fn connecting_to_an_unresponsive_guest_fails_at_the_deadline() -> Result<()> {
    let _vm_lock = VM_LOCK.lock().await;
    let (device, _qemus_end) = Device::start(3)?;
    let start = Instant::now();
    let result = device.connect(1, Duration::from_millis(100)).await;
    assert!(matches!(result, Err(VsockError::TimedOut { port: 1, .. })));
    assert!(start.elapsed() >= Duration::from_millis(100));
    device.stop();
    timeout(STEP, device.closed()).await?;
    assert!(matches!(device.connect(1, STEP).await, Err(VsockError::Closed)));
    Ok(())
}
