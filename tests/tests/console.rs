//! The guest's console: on `console.sock` for any number of clients, and on an operator's terminal with `husk console`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_tests::artifacts::built;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::operator::{SOON, folder, husk, husk_json};
use husk_tests::process;
use husk_tests::pty::Pty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Bytes of earlier output that each client receives.
const REPLAY: usize = 64 * 1024;
/// Creates a device file for the guest's serial port in a privileged container.
const SERIAL: &str = "[ -e /dev/serial ] || mknod /dev/serial c 4 64";

fn privileged<'a>(containerd: &'a Containerd, name: &str) -> Result<Container<'a>> {
    let container = containerd.detached(&["--privileged"], name, &["sleep", "1000"])?;
    container.script(SERIAL)?;
    Ok(container)
}

fn client(containerd: &Containerd, id: &str) -> Result<UnixStream> {
    let stream = husk_shim::host::socket::connect(&folder(containerd, id), "console.sock")?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

/// Reads until `needle` appears and returns the output before it. Fast, because the shim drops a client that is slow: it
/// searches each part of the output once.
fn until(stream: &mut UnixStream, needle: &str) -> Result<Vec<u8>> {
    let started = Instant::now();
    let (mut seen, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let searched = seen.len().saturating_sub(needle.len() - 1);
        match stream.read(&mut buffer)? {
            0 => {
                let last = String::from_utf8_lossy(&seen[seen.len().saturating_sub(200)..]);
                bail!("the stream ended before {needle:?}, after {} bytes, the last of them {last:?}", seen.len());
            }
            length => seen.extend_from_slice(&buffer[..length]),
        }
        if let Some(at) = seen[searched..].windows(needle.len()).position(|part| part == needle.as_bytes()) {
            seen.truncate(searched + at);
            return Ok(seen);
        }
        ensure!(started.elapsed() < SOON, "no {needle:?} in {} bytes", seen.len());
    }
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn every_client_gets_earlier_and_new_output_and_can_type() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = privileged(containerd, "console")?;
    container.script("echo first-words >/dev/serial")?;
    let mut clients = [client(containerd, container.id())?, client(containerd, container.id())?];
    for client in &mut clients {
        until(client, "first-words")?;
    }
    container.script("echo second-words >/dev/serial")?;
    for client in &mut clients {
        until(client, "second-words")?;
    }
    // Input of one client arrives at the serial port, and both see its echo on the console.
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope
            .spawn(|| container.script("stty -F /dev/serial sane; echo reads >/dev/serial; head -n 1 /dev/serial"));
        until(&mut clients[0], "reads")?;
        clients[1].write_all(b"typed words\n")?;
        let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure!(read == "typed words", "{read:?}");
        Ok(())
    })?;
    for client in &mut clients {
        until(client, "typed words")?;
    }
    // A client that shuts down its input gets the earlier output, then the end.
    let mut last = client(containerd, container.id())?;
    last.shutdown(std::net::Shutdown::Write)?;
    let mut all = Vec::new();
    last.read_to_end(&mut all)?;
    let text = String::from_utf8_lossy(&all);
    ensure!(text.contains("first-words") && text.contains("second-words"), "{text}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_slow_client_is_dropped_while_others_and_the_log_file_get_everything() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = privileged(containerd, "slow")?;
    let mut slow = client(containerd, container.id())?;
    let mut quick = client(containerd, container.id())?;
    // More than husk buffers for the slow client, plus its socket's buffer.
    let size = 1_000_000;
    let flood = format!(
        "stty -F /dev/serial raw; head -c {size} /dev/zero | tr '\\0' x >/dev/serial; echo flood-ends >/dev/serial"
    );
    let (mut command, started) = (container.exec(&["sh", "-c", &flood]).command(), Instant::now());
    let mut flooding = command.spawn()?;
    let received = until(&mut quick, "flood-ends").with_context(|| format!("after {:?}", started.elapsed()))?;
    ensure!(received.iter().filter(|&&byte| byte == b'x').count() == size, "{} bytes", received.len());
    wait_for(SOON, "the flooding exec exits", || flooding.try_wait().transpose())??;
    let (mut all, mut buffer) = (0, [0; 65536]);
    // The connection may be reset with unread data.
    while let Ok(length @ 1..) = slow.read(&mut buffer) {
        all += length;
    }
    ensure!(all < size, "{all} bytes were buffered for a client that did not read");
    let kept = std::fs::read(folder(containerd, container.id()).join("console.log"))?;
    ensure!(kept.iter().filter(|&&byte| byte == b'x').count() == size);
    // A new client gets the end of the output, and no more.
    let replayed = until(&mut client(containerd, container.id())?, "flood-ends")?;
    ensure!(replayed.len() > REPLAY - 100 && replayed.len() <= REPLAY, "{}", replayed.len());
    let dropped =
        || containerd.logged("dropped a console client").into_iter().find(|line| line.contains(container.id()));
    wait_for(SOON, "the shim logs that it has dropped the client", dropped)?;
    Ok(())
}

/// Runs `husk console` in a shell on a terminal. The shell prints husk's exit code, and whether the terminal's settings
/// were restored.
fn on_a_terminal(containerd: &Containerd, id: &str) -> Result<Pty> {
    let script = format!(
        "before=$(stty -g); {} console {id}; code=$?; [ \"$(stty -g)\" = \"$before\" ] && echo restored; echo ended with $code",
        built("husk")?.display()
    );
    let mut command: Command = containerd.enter("bash");
    command.args(["-c", &script]);
    Pty::spawn(command, 24, 80)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn husk_console_connects_a_terminal_until_the_user_leaves() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = privileged(containerd, "terminal")?;
    container.script("echo before-husk >/dev/serial")?;
    let mut pty = on_a_terminal(containerd, container.id())?;
    pty.expect("type ~. at the start of a line to leave", SOON)?;
    pty.expect("before-husk", SOON)?;
    pty.resize(50, 132)?;
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope
            .spawn(|| container.script("stty -F /dev/serial sane; echo reads >/dev/serial; head -n 2 /dev/serial"));
        pty.expect("reads", SOON)?;
        // A tilde in mid-line does not leave the console, nor does a doubled one.
        pty.send("a~.b\r~~.\r")?;
        let read = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure!(read == "a~.b\n~.", "{read:?}");
        Ok(())
    })?;
    pty.send("~.")?;
    let (rest, code) = pty.finish(SOON)?;
    ensure!(rest.contains("restored") && rest.contains("ended with 0") && code == 0, "{rest:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_terminal_is_restored_when_husk_is_killed_and_when_the_vm_dies() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = privileged(containerd, "restored")?;
    let id = container.id();
    container.script("echo before-husk >/dev/serial")?;
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129), (Signal::SIGINT, 130)] {
        let mut pty = on_a_terminal(containerd, id)?;
        pty.expect("before-husk", SOON)?;
        let own = format!("console {id}");
        let all = process::descendants(std::process::id() as i32);
        let husk = all.iter().find(|process| process.name == "husk" && process.command.ends_with(&own));
        kill(Pid::from_raw(husk.context("no husk")?.pid), signal)?;
        let (rest, _) = pty.finish(SOON)?;
        ensure!(rest.contains("restored") && rest.contains(&format!("ended with {code}")), "{signal}: {rest:?}");
    }
    let mut pty = on_a_terminal(containerd, id)?;
    pty.expect("before-husk", SOON)?;
    containerd.qemu_of(id)?.kill();
    let (rest, _) = pty.finish(SOON)?;
    ensure!(rest.contains("husk: the console has ended") && rest.contains("restored"), "{rest:?}");
    let ended = husk(containerd, &["console", id])?.ok()?;
    ensure!(ended.text().contains("before-husk") && ended.errors().contains("the console has ended"), "{ended}");
    ensure!(husk_json(containerd, &["console", "--json", id])?["machine"] == "ended");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn piped_input_is_sent_as_fast_as_the_guest_reads() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = privileged(containerd, "typed")?;
    let text: String = (0..200).map(|n| format!("line {n}\n")).collect();
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| {
            container
                .script("stty -F /dev/serial sane -echo; echo reads >/dev/serial; head -n 200 /dev/serial | md5sum")
        });
        until(&mut client(containerd, container.id())?, "reads")?;
        let command = husk_tests::operator::command(containerd, &["console", container.id()])?;
        let typed =
            husk_tests::command::run(command, Some(text.clone().into_bytes()), Duration::from_secs(60))?.ok()?;
        ensure!(typed.errors().contains("the input has ended; the VM keeps running"), "{typed}");
        let sum = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        let mut command = Command::new("md5sum");
        command.current_dir("/");
        let expected = husk_tests::command::run(command, Some(text.clone().into_bytes()), SOON)?.ok()?.text();
        ensure!(sum == expected, "{sum:?} {expected:?}");
        Ok(())
    })
}
