//! Standard streams: input and output arrive completely, in order and in time.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::events::task::TaskExit;
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::husk_only;
use husk_tests::shim::{Shim, Streams, feed};
use husk_tests::{bundle, command, fifo, process};

const DEADLINE: Duration = Duration::from_secs(60);

/// What `seq 1 last` prints.
fn sequence(last: usize) -> Vec<u8> {
    sequence_with(last, "\n")
}

fn sequence_with(last: usize, end: &str) -> Vec<u8> {
    (1..=last).flat_map(|n| format!("{n}{end}").into_bytes()).collect()
}

/// Fifos for all three streams of a process. Returns their paths, and the test's ends of stdin, stdout and stderr.
fn with_stdin(shim: &Shim<'_>, name: &str) -> Result<(Streams, fs::File, fifo::Reader, fifo::Reader)> {
    let (mut io, stdout, stderr) = shim.streams(name)?;
    let stdin = fifo::writer(&shim.bundle.outside.join(format!("{name}.in")))?;
    io.stdin = shim.bundle.path.join(format!("{name}.in")).display().to_string();
    Ok((io, stdin, stdout, stderr))
}

/// Compares bytes, without printing megabytes on failure.
fn expect_same(received: &[u8], expected: &[u8]) -> Result<()> {
    let differs = received.iter().zip(expected).position(|(received, expected)| received != expected);
    let (received, expected) = (received.len(), expected.len());
    ensure!(
        differs.is_none() && received == expected,
        "{received} of {expected} bytes, first difference at {differs:?}"
    );
    Ok(())
}

#[test]
fn stdin_passes_through_cat_unchanged_and_ends() -> Result<()> {
    let containerd = Containerd::shared()?;
    let bytes: Vec<u8> = (0..20_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let ran = containerd.run(&[], &containerd.id("cat"), &["cat"]).stdin(bytes.clone()).ok()?;
    expect_same(&ran.stdout, &bytes)
}

#[test]
fn an_empty_stdin_ends_when_it_is_closed() -> Result<()> {
    // Not through `ctr run`, which forgets to close a stdin that ends before the task is created.
    let containerd = Containerd::shared()?;
    let id = containerd.id("empty");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["wc", "-c"]))?;
    let (io, stdin, mut stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create_and_start(&io)?;
    drop(stdin);
    shim.task.close_stdin(&id, "")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"0\n");
    Ok(())
}

#[test]
fn a_client_that_writes_and_closes_stdin_at_once_finds_the_task() -> Result<()> {
    // As nerdctl does: after its input it calls CloseIO once, and does not retry if the task does not exist yet.
    let containerd = Containerd::shared()?;
    let id = containerd.id("at-once");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["cat"]))?;
    let (mut io, mut stdout, _stderr) = shim.streams("init")?;
    let stdin = shim.bundle.outside.join("init.in");
    fifo::make(&stdin)?;
    io.stdin = shim.bundle.path.join("init.in").display().to_string();
    std::thread::scope(|scope| -> Result<()> {
        let client = scope.spawn(|| -> Result<()> {
            // Opening a fifo for writing blocks until it has a reader: fifo(7).
            fs::OpenOptions::new().write(true).open(&stdin)?.write_all(b"through")?;
            Ok(shim.task.state(&id, "").map(drop)?)
        });
        shim.create(&io)?;
        client
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?
            .context("State failed although stdin was already open")
    })?;
    shim.task.close_stdin(&id, "")?;
    shim.task.start(&id, "")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"through");
    ensure!(shim.task.wait(&id, "")? == 0);
    Ok(())
}

#[test]
fn stdin_of_an_exec_passes_through_and_ends() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "exec-cat", &["sleep", "1000"])?;
    let bytes = sequence(200_000);
    expect_same(&container.exec(&["cat"]).stdin(bytes.clone()).ok()?.stdout, &bytes)
}

#[test]
fn eight_mebibytes_before_an_immediate_exit_are_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    let ran = containerd.run(&[], &containerd.id("burst"), &["sh", "-c", "seq 1 1200000; exit 3"]).expect_code(3)?;
    ensure!(ran.stdout.len() > 8 << 20);
    expect_same(&ran.stdout, &sequence(1_200_000))
}

#[test]
fn stdout_and_stderr_stay_separate() -> Result<()> {
    let containerd = Containerd::shared()?;
    let script = "seq 1 20000; seq 1 10000 >&2; echo end; echo end >&2";
    let ran = containerd.run(&[], &containerd.id("apart"), &["sh", "-c", script]).ok()?;
    expect_same(&ran.stdout, &[sequence(20_000), b"end\n".to_vec()].concat())?;
    expect_same(&ran.stderr, &[sequence(10_000), b"end\n".to_vec()].concat())
}

#[test]
fn output_of_a_fast_exit_is_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    for round in 0..10 {
        let ran = containerd.run(&[], &containerd.id("fast"), &["echo", "x"]).ok()?;
        ensure!(ran.stdout == b"x\n", "round {round}: {ran}");
    }
    Ok(())
}

#[test]
fn output_of_100_fast_execs_is_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "fast-execs")?;
    let id = shim.bundle.id.clone();
    for round in 0..100 {
        let exec = format!("e{round}");
        let (io, mut stdout, mut stderr) = shim.streams(&exec)?;
        let script = format!("echo {round}; echo {round} >&2; exit {}", round % 100);
        shim.start_exec(&exec, &bundle::process(&["sh", "-c", &script]), &io)?;
        let (out, err) = (stdout.read_to_end(DEADLINE)?, stderr.read_to_end(DEADLINE)?);
        let status = shim.task.wait(&id, &exec)?;
        shim.task.delete(&id, &exec)?;
        let expected = format!("{round}\n").into_bytes();
        ensure!(out == expected && err == expected && status == round % 100, "{round}: {out:?} {err:?} {status}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn all_output_is_available_when_the_exit_is_published() -> Result<()> {
    expect_output_before_the_exit(Containerd::shared()?)
}

fn expect_output_before_the_exit(containerd: &Containerd) -> Result<()> {
    // runc's shim publishes the exit first and continues copying.
    let shim = Shim::idle(containerd, "announced")?;
    let id = shim.bundle.id.clone();
    shim.events.until("/tasks/start", DEADLINE)?;
    let expected = sequence(8_000);
    for round in 0..20 {
        let exec = format!("e{round}");
        let (io, stdout, _stderr) = shim.streams(&exec)?;
        shim.start_exec(&exec, &bundle::process(&["seq", "1", "8000"]), &io)?;
        let events = shim.events.until("/tasks/exit", DEADLINE)?;
        let exit: TaskExit = events.last().context("an exit event")?.decode()?;
        // Less than a pipe's capacity: all output must be in the fifo without a reader.
        expect_same(&stdout.available()?, &expected).with_context(|| format!("round {round}"))?;
        ensure!(exit.id == exec && exit.exit_status == 0, "{exit:?}");
        shim.task.delete(&id, &exec)?;
    }
    Ok(())
}

#[test]
fn a_slow_reader_gets_everything_even_after_the_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("slow");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["seq", "1", "300000"]))?;
    let (io, mut stdout, _stderr) = shim.streams("init")?;
    shim.create_and_start(&io)?;
    let expected = sequence(300_000);
    let mut received = Vec::new();
    loop {
        let bytes = stdout.read(8 * 1024, DEADLINE)?;
        if bytes.is_empty() {
            break;
        }
        received.extend(bytes);
        // The slow reading under test: some 4 MiB/s.
        thread::sleep(Duration::from_millis(2));
    }
    expect_same(&received, &expected)?;
    ensure!(shim.task.wait(&id, "")? == 0);
    Ok(())
}

#[test]
fn a_stalled_reader_delays_no_other_stream() -> Result<()> {
    expect_streams_apart(Containerd::shared()?)
}

fn expect_streams_apart(containerd: &Containerd) -> Result<()> {
    let shim = Shim::idle(containerd, "stalls")?;
    let id = shim.bundle.id.clone();

    let (io, mut stalled, _err) = shim.streams("stalled")?;
    shim.start_exec("stalled", &bundle::process(&["seq", "1", "600000"]), &io)?;
    stalled.read(1, DEADLINE)?;

    let (io, mut stdout, _err) = shim.streams("other")?;
    shim.start_exec("other", &bundle::process(&["seq", "1", "100000"]), &io)?;
    expect_same(&stdout.read_to_end(DEADLINE)?, &sequence(100_000))?;
    ensure!(shim.task.wait(&id, "other")? == 0);

    let rest = stalled.read_to_end(DEADLINE)?;
    expect_same(&rest, &sequence(600_000)[1..])?;
    ensure!(shim.task.wait(&id, "stalled")? == 0);
    Ok(())
}

#[test]
fn a_process_that_never_reads_its_stdin_delays_nothing_else() -> Result<()> {
    expect_unread_stdin_apart(Containerd::shared()?)
}

fn expect_unread_stdin_apart(containerd: &Containerd) -> Result<()> {
    let id = containerd.id("unread");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let (io, stdin, _stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create_and_start(&io)?;
    // Far more than all buffers on the way hold: the writer stays blocked to the end.
    feed(stdin, sequence(2_000_000));

    let (io, mut stdout, _err) = shim.streams("other")?;
    shim.start_exec("other", &bundle::process(&["seq", "1", "100000"]), &io)?;
    expect_same(&stdout.read_to_end(DEADLINE)?, &sequence(100_000))?;

    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137);
    // One that waited for the stdin, which nobody reads, would not return.
    shim.task.delete(&id, "")?;
    Ok(())
}

#[test]
fn close_io_ends_stdin_while_the_fifo_stays_open() -> Result<()> {
    expect_end_after_close_io(Containerd::shared()?)
}

fn expect_end_after_close_io(containerd: &Containerd) -> Result<()> {
    let id = containerd.id("close");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "cat; echo end"]))?;
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create_and_start(&io)?;
    stdin.write_all(b"first ")?;
    ensure!(stdout.read(100, DEADLINE)? == b"first ");
    stdin.write_all(b"last ")?;
    drop(stdin);
    shim.task.close_stdin(&id, "")?;
    let rest = stdout.read_to_end(DEADLINE)?;
    ensure!(rest == b"last end\n", "{:?}", String::from_utf8_lossy(&rest));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn streams_have_all_their_properties_as_messages_too() -> Result<()> {
    let configured = Configured::start("streams = \"ttrpc\"\n")?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "messages", &["sleep", "1000"])?;
    let bytes = sequence(1_000_000);
    expect_same(&container.exec(&["cat"]).stdin(bytes.clone()).ok()?.stdout, &bytes)?;
    expect_output_before_the_exit(containerd)?;
    expect_streams_apart(containerd)?;
    expect_unread_stdin_apart(containerd)?;
    expect_end_after_close_io(containerd)?;
    expect_exit_before_the_childs(containerd)
}

#[test]
fn many_clients_wait_for_one_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "waiters")?;
    let id = shim.bundle.id.clone();
    let (send, statuses) = mpsc::channel();
    for _ in 0..5 {
        let (task, id, send) = (shim.task.clone(), id.clone(), send.clone());
        thread::spawn(move || send.send(task.wait(&id, "")));
    }
    shim.task.kill(&id, "", 9)?;
    for _ in 0..5 {
        let status = statuses.recv_timeout(DEADLINE).context("a Wait did not return")?;
        ensure!(matches!(status, Ok(137)), "{status:?}");
    }
    ensure!(shim.task.wait(&id, "")? == 137, "Wait after the exit");
    Ok(())
}

#[test]
fn checksums_inside_and_outside_are_equal() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "sums", &["sleep", "1000"])?;
    let bytes = sequence(1_000_000);
    let inside = container.exec(&["sha256sum"]).stdin(bytes.clone()).ok()?.text();
    let outside = command::run(Command::new("sha256sum"), Some(bytes), DEADLINE)?.ok()?.text();
    ensure!(inside == outside && inside.len() > 64, "{inside} inside, {outside} outside");
    Ok(())
}

#[test]
fn sixty_four_mebibytes_are_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "much", &["sleep", "1000"])?;
    let ran = container.exec(&["sh", "-c", "yes 0123456789abcde | head -c 67108864; exit 3"]).expect_code(3)?;
    ensure!(ran.stdout.len() == 64 << 20, "{} bytes", ran.stdout.len());
    let wrong = ran.stdout.chunks(16).position(|line| line != b"0123456789abcde\n");
    ensure!(wrong.is_none(), "line {wrong:?} differs");
    Ok(())
}

#[test]
fn repeated_close_io_is_harmless_and_an_early_one_is_remembered() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("closes");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "wc -c; exec sleep 1000"]))?;
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create_and_start(&io)?;
    stdin.write_all(b"four")?;
    drop(stdin);
    for _ in 0..3 {
        shim.task.close_stdin(&id, "")?;
    }
    ensure!(stdout.read_until("\n", DEADLINE)? == "4\n");
    shim.task.close_stdin(&id, "")?;
    // runc's shim forgets a CloseIO before Start.
    husk_only!();
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim, "early")?;
    shim.task.exec(&id, "early", &bundle::process(&["wc", "-c"]), &io)?;
    // The fifo stays open: its content would be lost with its last descriptor.
    stdin.write_all(b"seven..")?;
    shim.task.close_stdin(&id, "early")?;
    shim.task.start(&id, "early")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"7\n");
    Ok(())
}

#[test]
fn stdin_continues_when_its_writer_is_replaced() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("rejoins");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "cat; echo end"]))?;
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create_and_start(&io)?;
    stdin.write_all(b"first\n")?;
    drop(stdin);
    ensure!(stdout.read_until("\n", DEADLINE)? == "first\n");
    for round in 0..3 {
        let mut stdin = fs::OpenOptions::new().write(true).open(shim.bundle.outside.join("init.in"))?;
        writeln!(stdin, "round {round}")?;
        drop(stdin);
        ensure!(stdout.read_until("\n", DEADLINE)? == format!("round {round}\n"));
    }
    shim.task.close_stdin(&id, "")?;
    let rest = stdout.read_to_end(DEADLINE)?;
    ensure!(rest == b"end\n", "{:?}", String::from_utf8_lossy(&rest));
    Ok(())
}

#[test]
fn a_process_that_never_reads_its_stdin_can_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("ends");
    let shim = Shim::start(
        containerd,
        &id,
        &bundle::spec(&id, &["sh", "-c", "until [ -e /go ]; do sleep 0.1; done; exit 5"]),
    )?;
    let (io, stdin, _stdout, _stderr) = with_stdin(&shim, "init")?;
    shim.create(&io)?;
    feed(stdin, sequence(2_000_000));
    shim.task.start(&id, "")?;
    // If CloseIO waited for the process, or the exit for the stdin, neither would ever return.
    shim.task.close_stdin(&id, "")?;
    shim.start_exec("go", &bundle::process(&["touch", "/go"]), &Streams::default())?;
    ensure!(shim.task.wait(&id, "")? == 5);
    Ok(())
}

#[test]
fn the_next_reader_continues_where_the_last_one_stopped() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("leaves");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "seq 1 300000; exit 4"]))?;
    let (io, mut stdout, _stderr) = shim.streams("init")?;
    shim.create_and_start(&io)?;
    let expected = sequence(300_000);
    let mut received = Vec::new();
    // The fifo always has a reader, because its content would be lost otherwise. The same is true of containerd's
    // clients.
    for _ in 0..5 {
        let path = shim.bundle.outside.join("init.out");
        let mut reader = fifo::Reader::open(&path)?;
        received.extend(reader.read(100_000, DEADLINE)?);
    }
    received.extend(stdout.read_to_end(DEADLINE)?);
    expect_same(&received, &expected)?;
    ensure!(shim.task.wait(&id, "")? == 4);
    Ok(())
}

#[test]
fn a_child_that_keeps_the_output_open_delays_neither_the_exit_nor_earlier_output() -> Result<()> {
    expect_exit_before_the_childs(Containerd::shared()?)
}

fn expect_exit_before_the_childs(containerd: &Containerd) -> Result<()> {
    let shim = Shim::idle(containerd, "grandchild")?;
    let id = shim.bundle.id.clone();
    let in_terminal = |mut process: serde_json::Value| {
        process["terminal"] = true.into();
        process
    };
    let silent = "trap '' HUP; seq 1 8000; sleep 1000 & exit 5";
    // The child floods the inherited output, and only the test reads from it.
    let loud = "seq 1 8000; yes flood & exit 5";
    for (exec, script, terminal) in [("silent", silent, false), ("loud", loud, false), ("terminal", silent, true)] {
        let (_input, _stderr);
        let (io, mut stdout) = if terminal {
            let (io, input, output) = shim.terminal(exec)?;
            _input = input;
            (io, output)
        } else {
            let (io, stdout, stderr) = shim.streams(exec)?;
            _stderr = stderr;
            (io, stdout)
        };
        let process = bundle::process(&["sh", "-c", script]);
        shim.start_exec(exec, &if terminal { in_terminal(process) } else { process }, &io)?;
        // If the exit waited for the child, it would not come.
        ensure!(shim.task.wait(&id, exec)? == 5, "{exec}");
        let expected = sequence_with(8_000, if terminal { "\r\n" } else { "\n" });
        let mut received = Vec::new();
        while received.len() < expected.len() {
            received.extend(stdout.read(expected.len() - received.len(), DEADLINE)?);
        }
        expect_same(&received, &expected).with_context(|| exec.to_owned())?;
        shim.task.delete(&id, exec)?;
        // Delete ends the process's streams, even if other processes hold the other ends.
        while !stdout.read(64 * 1024, DEADLINE).with_context(|| format!("{exec}: the end of stdout"))?.is_empty() {}
    }
    Ok(())
}

#[test]
fn clients_can_attach_and_leave_repeatedly() -> Result<()> {
    let containerd = Containerd::shared()?;
    let script = "while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; echo end";
    let container = containerd.detached(&[], "attach", &["sh", "-c", script])?;
    for round in 0..4 {
        let mut command = containerd.ctr(["task", "attach", container.id()]).command();
        let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = client.stdin.take().context("stdin")?;
        writeln!(stdin, "{round}")?;
        for (stream, expected) in [
            (client.stdout.take().map(OwnedFd::from), format!("got {round}\n")),
            (client.stderr.take().map(OwnedFd::from), format!("err {round}\n")),
        ] {
            let (send, line) = mpsc::channel();
            let mut lines = BufReader::new(fs::File::from(stream.context("stream")?));
            thread::spawn(move || {
                let mut line = String::new();
                send.send(lines.read_line(&mut line).map(|_| line))
            });
            let line = line.recv_timeout(DEADLINE).with_context(|| format!("round {round}: {expected:?}"))??;
            ensure!(line == expected, "round {round}: {line:?}");
        }
        // Half of the clients end their stdin first, which must not end the container's.
        if round % 2 == 0 {
            drop(stdin);
        }
        process::kill_tree(client.id() as i32);
        client.wait()?;
    }
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    Ok(())
}

#[test]
fn a_second_start_is_rejected_and_does_not_disturb_the_first() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "twice")?;
    let id = shim.bundle.id.clone();
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim, "e")?;
    shim.task.exec(&id, "e", &bundle::process(&["sh", "-c", "echo begun; read line; echo got $line"]), &io)?;
    shim.task.start(&id, "e")?;
    ensure!(stdout.read_until("\n", DEADLINE)? == "begun\n");
    ensure!(shim.task.start(&id, "e").is_err());
    stdin.write_all(b"it\n")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"got it\n");
    ensure!(shim.task.wait(&id, "e")? == 0);
    Ok(())
}
