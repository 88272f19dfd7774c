//! What a process reads and writes arrives whole, in order and in time.

use std::fs;
use std::io::Write;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::events::task::TaskExit;
use husk_tests::bundle;
use husk_tests::containerd::Containerd;
use husk_tests::fifo;
use husk_tests::shim::{Shim, Streams, feed};

const DEADLINE: Duration = Duration::from_secs(60);

/// What `seq 1 last` prints.
fn sequence(last: usize) -> Vec<u8> {
    (1..=last).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

/// Fifos for all three streams of the init process; the test's ends of stdin, stdout and stderr.
fn with_stdin(shim: &Shim<'_>) -> Result<(Streams, fs::File, fifo::Reader, fifo::Reader)> {
    let (mut io, stdout, stderr) = shim.streams("init")?;
    let stdin = fifo::writer(&shim.bundle.outside.join("init.in"))?;
    io.stdin = shim.bundle.path.join("init.in").display().to_string();
    Ok((io, stdin, stdout, stderr))
}

/// Compares without printing megabytes.
fn expect_same(got: &[u8], wanted: &[u8]) -> Result<()> {
    let differs = got.iter().zip(wanted).position(|(got, wanted)| got != wanted);
    let (got, wanted) = (got.len(), wanted.len());
    ensure!(differs.is_none() && got == wanted, "{got} bytes of {wanted}, the first wrong one at {differs:?}");
    Ok(())
}

#[test]
fn stdin_passes_through_cat_unharmed_and_ends() -> Result<()> {
    let containerd = Containerd::shared()?;
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let ran = containerd.run(&[], &containerd.id("cat"), &["cat"]).stdin(bytes.clone()).ok()?;
    expect_same(&ran.stdout, &bytes)
}

#[test]
fn an_empty_stdin_ends_when_it_is_closed() -> Result<()> {
    // Not through `ctr run`: it forgets to close a stdin that ends before the task is created.
    let containerd = Containerd::shared()?;
    let id = containerd.id("empty");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["wc", "-c"]))?;
    let (io, stdin, mut stdout, _stderr) = with_stdin(&shim)?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    drop(stdin);
    shim.task.close_stdin(&id, "")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"0\n");
    Ok(())
}

#[test]
fn the_stdin_of_an_exec_passes_through_and_ends() -> Result<()> {
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
fn stdout_and_stderr_stay_apart() -> Result<()> {
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
    let id = containerd.id("fast-execs");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.create(&Default::default())?;
    shim.task.start(&id, "")?;
    for round in 0..100 {
        let exec = format!("e{round}");
        let (io, mut stdout, mut stderr) = shim.streams(&exec)?;
        let script = format!("echo {round}; echo {round} >&2; exit {}", round % 100);
        shim.task.exec(&id, &exec, &bundle::process(&["sh", "-c", &script]), &io)?;
        shim.task.start(&id, &exec)?;
        let (out, err) = (stdout.read_to_end(DEADLINE)?, stderr.read_to_end(DEADLINE)?);
        let status = shim.task.wait(&id, &exec)?;
        shim.task.delete(&id, &exec)?;
        let wanted = format!("{round}\n").into_bytes();
        ensure!(out == wanted && err == wanted && status == round % 100, "{round}: {out:?} {err:?} {status}");
    }
    Ok(())
}

#[test]
fn when_the_exit_is_announced_all_output_is_there() -> Result<()> {
    let containerd = Containerd::shared()?;
    if !containerd.runtime().is_husk_or_tell("when_the_exit_is_announced_all_output_is_there") {
        // runc's shim announces the exit first and copies on.
        return Ok(());
    }
    let id = containerd.id("announced");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.create(&Default::default())?;
    shim.task.start(&id, "")?;
    shim.events.until("/tasks/start", DEADLINE)?;
    let wanted = sequence(8_000);
    for round in 0..20 {
        let exec = format!("e{round}");
        let (io, stdout, _stderr) = shim.streams(&exec)?;
        shim.task.exec(&id, &exec, &bundle::process(&["seq", "1", "8000"]), &io)?;
        shim.task.start(&id, &exec)?;
        let events = shim.events.until("/tasks/exit", DEADLINE)?;
        let exit: TaskExit = events.last().context("an exit event")?.decode()?;
        // Less than a pipe holds: it all has to lie there without anybody having read.
        expect_same(&stdout.available()?, &wanted).with_context(|| format!("round {round}"))?;
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
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    let wanted = sequence(300_000);
    let mut got = Vec::new();
    loop {
        let bytes = stdout.read(8 * 1024, DEADLINE)?;
        if bytes.is_empty() {
            break;
        }
        got.extend(bytes);
        // The slowness that is being tested: some 4 MiB a second.
        thread::sleep(Duration::from_millis(2));
    }
    expect_same(&got, &wanted)?;
    ensure!(shim.task.wait(&id, "")? == 0);
    Ok(())
}

#[test]
fn a_reader_that_stalls_holds_up_nobody_else() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("stalls");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.create(&Default::default())?;
    shim.task.start(&id, "")?;

    let (io, mut stalled, _err) = shim.streams("stalled")?;
    shim.task.exec(&id, "stalled", &bundle::process(&["seq", "1", "600000"]), &io)?;
    shim.task.start(&id, "stalled")?;
    stalled.read(1, DEADLINE)?;

    let (io, mut stdout, _err) = shim.streams("other")?;
    shim.task.exec(&id, "other", &bundle::process(&["seq", "1", "100000"]), &io)?;
    shim.task.start(&id, "other")?;
    expect_same(&stdout.read_to_end(DEADLINE)?, &sequence(100_000))?;
    ensure!(shim.task.wait(&id, "other")? == 0);

    let rest = stalled.read_to_end(DEADLINE)?;
    expect_same(&rest, &sequence(600_000)[1..])?;
    ensure!(shim.task.wait(&id, "stalled")? == 0);
    Ok(())
}

#[test]
fn a_process_that_never_reads_its_stdin_holds_up_nobody() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("unread");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    let (io, stdin, _stdout, _stderr) = with_stdin(&shim)?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    // Far more than all buffers on the way hold: the writer stays stuck to the end.
    feed(stdin, sequence(2_000_000));

    let (io, mut stdout, _err) = shim.streams("other")?;
    shim.task.exec(&id, "other", &bundle::process(&["seq", "1", "100000"]), &io)?;
    shim.task.start(&id, "other")?;
    expect_same(&stdout.read_to_end(DEADLINE)?, &sequence(100_000))?;

    shim.task.kill(&id, "", 9)?;
    ensure!(shim.task.wait(&id, "")? == 137);
    let started = Instant::now();
    shim.task.delete(&id, "")?;
    ensure!(started.elapsed() < Duration::from_secs(10), "Delete waited for a stdin that nobody reads");
    Ok(())
}

#[test]
fn closing_stdin_ends_it_though_its_fifo_stays_open() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("close");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sh", "-c", "cat; echo end"]))?;
    let (io, mut stdin, mut stdout, _stderr) = with_stdin(&shim)?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
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
fn many_clients_wait_for_one_exit() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("waiters");
    let shim = Shim::start(containerd, &id, &bundle::spec(&id, &["sleep", "1000"]))?;
    shim.create(&Default::default())?;
    shim.task.start(&id, "")?;
    let (send, statuses) = mpsc::channel();
    for _ in 0..5 {
        let (task, id, send) = (shim.task.clone(), id.clone(), send.clone());
        thread::spawn(move || send.send(task.wait(&id, "")));
    }
    shim.task.kill(&id, "", 9)?;
    for _ in 0..5 {
        let status = statuses.recv_timeout(DEADLINE).context("a waiter has no answer")?;
        ensure!(matches!(status, Ok(137)), "{status:?}");
    }
    ensure!(shim.task.wait(&id, "")? == 137, "a wait after the exit");
    Ok(())
}
