//! `ctr run -t` and `ctr task exec -t`, as a user at the terminal experiences them.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Container, Containerd};
use husk_tests::pty::Pty;
use husk_tests::shim::{Shim, code};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// A process with a terminal.
fn process(args: &[&str]) -> Value {
    let mut process = bundle::process(args);
    process["terminal"] = json!(true);
    process
}

fn spec(id: &str, args: &[&str]) -> Value {
    let mut spec = bundle::spec(id, args);
    spec["process"] = process(args);
    spec
}

fn exec_in_terminal(container: &Container<'_>, args: &[&str]) -> Result<Pty> {
    let containerd = Containerd::shared()?;
    let ctr = containerd.ctr(["task", "exec", "--tty", "--exec-id"]).arg(containerd.id("tty")).arg(container.id());
    Pty::spawn(ctr.args(args).command(), 33, 101)
}

/// Uses job control in a new shell and checks the terminal's size, then exits the shell with status 7.
fn use_shell(shell: &mut Pty) -> Result<()> {
    // The arithmetic distinguishes the output from the echo of the command.
    shell.send("until [ \"$(stty size)\" = '33 101' ]; do sleep 0.1; done; echo sized $((1 + 1))\n")?;
    let start = shell.expect("sized 2", DEADLINE)?;
    ensure!(!start.contains("job control turned off"), "{start}");
    shell.send("tty; echo tty $?\n")?;
    let tty = shell.expect("tty 0", DEADLINE)?;
    ensure!(tty.contains("/dev/pts/"), "{tty}");

    shell.send("sh -c 'echo run $((2 + 2)); exec sleep 1000'\n")?;
    shell.expect("run 4", DEADLINE)?;
    shell.send("\x03")?;
    shell.send("echo interrupted $?\n")?;
    shell.expect("interrupted 130", DEADLINE)?;

    shell.send("sh -c 'echo run $((3 + 3)); exec sleep 1000'\n")?;
    shell.expect("run 6", DEADLINE)?;
    shell.send("\x1a")?;
    shell.expect("Stopped", DEADLINE)?;
    shell.send("kill %1; fg; echo ended $?\n")?;
    shell.expect("ended 143", DEADLINE)?;

    let script = "trap \"stty size; exit 3\" WINCH; echo set $((4 + 4)); while :; do sleep 0.1; done";
    shell.send(&format!("sh -c '{script}'\n"))?;
    shell.expect("set 8", DEADLINE)?;
    shell.resize(40, 120)?;
    shell.expect("40 120", DEADLINE)?;
    shell.send("exit 7\n")
}

#[test]
fn a_ctr_run_shell_has_a_terminal_with_job_control() -> Result<()> {
    let containerd = Containerd::shared()?;
    let run = containerd.run(&["--tty"], &containerd.id("shell"), &["sh"]);
    let mut shell = Pty::spawn(run.command(), 33, 101)?;
    use_shell(&mut shell)?;
    let (rest, status) = shell.finish(DEADLINE)?;
    ensure!(status == 7, "status {status}: {rest}");
    Ok(())
}

#[test]
fn a_ctr_exec_shell_has_a_terminal_with_job_control() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "shells", &["sleep", "1000"])?;
    // Twice: the first terminal must have been released.
    for _ in 0..2 {
        let mut shell = exec_in_terminal(&container, &["sh"])?;
        use_shell(&mut shell)?;
        let (rest, status) = shell.finish(DEADLINE)?;
        ensure!(status == 7, "status {status}: {rest}");
    }
    let terminals = container.script("ls /dev/pts")?;
    ensure!(terminals == "ptmx", "terminals remain: {terminals}");
    Ok(())
}

#[test]
fn full_screen_programs_use_the_terminals_size() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "screen", &["sleep", "1000"])?;
    container.script("seq 1 200 > /lines")?;
    let open = |program: &str| -> Result<Pty> {
        let sized = format!("until [ \"$(stty size)\" = '33 101' ]; do sleep 0.1; done; exec {program} /lines");
        let mut opened = exec_in_terminal(&container, &["sh", "-c", &sized])?;
        // The last of 33 lines is the status line.
        let screen = opened.expect("/lines", DEADLINE)?;
        ensure!(screen.contains("32") && !screen.contains("33\r") && !screen.contains("34"), "{program}: {screen:?}");
        Ok(opened)
    };
    let mut less = open("less")?;
    less.send(" ")?;
    less.expect("64\r", DEADLINE)?;
    less.send("G")?;
    less.expect("200\r", DEADLINE)?;
    less.send("q")?;
    let (rest, status) = less.finish(DEADLINE)?;
    ensure!(status == 0, "{status}: {rest:?}");

    let mut vi = open("vi")?;
    vi.send("dd:wq\r")?;
    let (rest, status) = vi.finish(DEADLINE)?;
    ensure!(status == 0, "{status}: {rest:?}");
    ensure!(container.script("head -n 1 /lines")? == "2");
    Ok(())
}

#[test]
fn the_terminal_has_its_size_from_the_start() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("size");
    let mut with_size = spec(&id, &["sh", "-c", "stty size; exec sleep 1000"]);
    with_size["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    let shim = Shim::start(containerd, &id, &with_size)?;
    let (io, _input, mut output) = shim.terminal("init")?;
    shim.create(&io)?;
    shim.task.resize(&id, "", 31, 111)?;
    shim.task.start(&id, "")?;
    let size = output.read_until("\n", DEADLINE)?;
    ensure!(size == "31 111\r\n", "resized before Start: {size:?}");

    let mut stty = process(&["stty", "size"]);
    stty["consoleSize"] = json!({"height": 30, "width": 100});
    for (name, resize, expected) in [("spec", None, "30 100\r\n"), ("asked", Some((32, 112)), "32 112\r\n")] {
        if resize.is_some() && !containerd.runtime().is_husk_or_report_skip() {
            // runc's shim accepts a resize before Start and forgets it.
            continue;
        }
        let (io, _input, mut output) = shim.terminal(name)?;
        shim.task.exec(&id, name, &stty, &io)?;
        if let Some((height, width)) = resize {
            shim.task.resize(&id, name, height, width)?;
        }
        shim.task.start(&id, name)?;
        let size = output.read_until("\n", DEADLINE)?;
        ensure!(size == expected, "{name}: {size:?}");
        ensure!(shim.task.wait(&id, name)? == 0);
        shim.task.delete(&id, name)?;
    }
    Ok(())
}

#[test]
fn state_reports_the_terminal_and_resize_requires_a_running_process() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "resizes")?;
    let id = shim.bundle.id.clone();
    ensure!(!shim.task.state(&id, "")?.terminal);
    // Without a terminal, a resize has no effect and is not an error.
    shim.task.resize(&id, "", 10, 20)?;

    let (io, _input, mut output) = shim.terminal("t")?;
    shim.task.exec(&id, "t", &process(&["true"]), &io)?;
    ensure!(shim.task.state(&id, "t")?.terminal);
    shim.task.start(&id, "t")?;
    ensure!(shim.task.wait(&id, "t")? == 0);
    ensure!(output.read_to_end(DEADLINE)?.is_empty());
    let after_the_exit = shim.task.resize(&id, "t", 10, 20);
    ensure!(after_the_exit.is_err(), "an exited process was resized");
    shim.task.delete(&id, "t")?;
    let deleted = shim.task.resize(&id, "t", 10, 20);
    ensure!(code(&deleted) == Some(Code::NOT_FOUND), "{deleted:?}");
    Ok(())
}

#[test]
fn terminal_output_right_before_the_exit_is_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "last-words")?;
    let id = shim.bundle.id.clone();
    let expected: String = (1..=3000).map(|n| format!("{n}\r\n")).collect();
    for round in 0..10 {
        let exec = format!("e{round}");
        let (io, _input, mut output) = shim.terminal(&exec)?;
        shim.start_exec(&exec, &process(&["seq", "1", "3000"]), &io)?;
        let received = String::from_utf8(output.read_to_end(DEADLINE)?)?;
        let differs = received.bytes().zip(expected.bytes()).position(|(received, expected)| received != expected);
        let (got, all) = (received.len(), expected.len());
        ensure!(received == expected, "round {round}: {got} of {all} bytes, first difference at {differs:?}");
        ensure!(shim.task.wait(&id, &exec)? == 0);
        shim.task.delete(&id, &exec)?;
    }
    Ok(())
}

/// containerd's CRI plugin closes an exec's output as soon as it cannot write to its terminal, and loses what it has not
/// read. A client that types while the process exits must therefore be able to write until the process is deleted.
#[test]
fn typing_into_a_terminal_whose_process_has_exited_is_no_error() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "late")?;
    let id = shim.bundle.id.clone();
    let (io, input, mut output) = shim.terminal("quick")?;
    shim.start_exec("quick", &process(&["echo", "quick"]), &io)?;
    ensure!(shim.task.wait(&id, "quick")? == 0);
    // The test's own end could be read from, too.
    drop(input);
    let fifo = shim.bundle.outside.join("quick.input");
    let open = || OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&fifo);
    // More than fits into the fifo.
    let mut late = open().context("nobody reads the terminal's input any more")?;
    let mut written = 0;
    wait_for(DEADLINE, "the input is read", || {
        written += late.write(&[b'x'; 4096]).unwrap_or(0);
        (written > 256 * 1024).then_some(())
    })?;
    ensure!(output.read_to_end(DEADLINE)? == b"quick\r\n");
    shim.task.delete(&id, "quick")?;
    // runc's shim keeps it open.
    if containerd.runtime() == Runtime::Husk {
        ensure!(open().is_err_and(|error| error.raw_os_error() == Some(libc::ENXIO)), "still open after Delete");
    }
    Ok(())
}

#[test]
fn a_terminal_belongs_to_the_processs_user() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("owner");
    let script = "echo mine > $(tty) && stat -c %u $(tty) && exec sleep 1000";
    let mut with_user = spec(&id, &["sh", "-c", script]);
    with_user["process"]["user"] = json!({"uid": 1234, "gid": 1234});
    let shim = Shim::start(containerd, &id, &with_user)?;
    let (io, _input, mut output) = shim.terminal("init")?;
    shim.create_and_start(&io)?;
    let text = output.read_until("1234\r\n", DEADLINE)?;
    ensure!(text == "mine\r\n1234\r\n", "{text:?}");

    let mut exec = process(&["sh", "-c", "echo mine > $(tty) && stat -c %u $(tty)"]);
    exec["user"] = json!({"uid": 4321, "gid": 4321});
    let (io, _input, mut output) = shim.terminal("exec")?;
    shim.start_exec("exec", &exec, &io)?;
    let text = String::from_utf8(output.read_to_end(DEADLINE)?)?;
    ensure!(text == "mine\r\n4321\r\n", "{text:?}");
    Ok(())
}

#[test]
fn dev_console_of_a_container_is_its_terminal() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("console");
    let shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", "echo by name > /dev/console; exec sleep 1000"]))?;
    let (io, _input, mut output) = shim.terminal("init")?;
    shim.create_and_start(&io)?;
    ensure!(output.read_until("\n", DEADLINE)? == "by name\r\n");
    Ok(())
}

#[test]
fn remaining_processes_receive_sighup_when_the_session_ends() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "hang-up", &["sleep", "1000"])?;
    let mut shell = exec_in_terminal(&container, &["sh"])?;
    // The child in the foreground outlives its shell, the session leader.
    let child = "trap \"echo hung up > /received; exit\" HUP; echo ready $((1 + 1)); while :; do sleep 0.1; done";
    shell.send("echo $$ > /shell\n")?;
    shell.send(&format!("sh -c '{child}'\n"))?;
    shell.expect("ready 2", DEADLINE)?;
    container.script("kill -9 $(cat /shell)")?;
    let (rest, status) = shell.finish(DEADLINE)?;
    ensure!(status == 137, "{status}: {rest}");
    let received = container.script("until [ -s /received ]; do sleep 0.1; done; cat /received")?;
    ensure!(received == "hung up", "{received}");
    Ok(())
}

#[test]
fn a_leaving_client_does_not_end_the_process_and_another_can_attach() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("left");
    let container = containerd.adopt(&id);
    let ctr = containerd.ctr(["run", "--tty", "--runtime", containerd.runtime().name(), containerd.image(), &id, "sh"]);
    let mut client = Pty::spawn(ctr.command(), 24, 80)?;
    client.send("state=kept; echo first $((1 + 1))\n")?;
    client.expect("first 2", DEADLINE)?;
    drop(client);

    for round in 1..=3 {
        let attach = containerd.ctr(["task", "attach", container.id()]);
        let mut client = Pty::spawn(attach.command(), 25, 90)?;
        client.send(&format!("echo $state {round}$((round + 1))\n"))?;
        client.expect(&format!("kept {round}1"), DEADLINE)?;
        drop(client);
    }
    let attach = containerd.ctr(["task", "attach", container.id()]);
    let mut client = Pty::spawn(attach.command(), 25, 90)?;
    client.send("until [ \"$(stty size)\" = '25 90' ]; do sleep 0.1; done; exit 9\n")?;
    let (rest, status) = client.finish(DEADLINE).context("the last client")?;
    ensure!(status == 9, "{status}: {rest}");
    Ok(())
}

#[test]
fn the_request_decides_about_an_execs_terminal_and_a_containers_spec_must_agree() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "differ")?;
    let id = shim.bundle.id.clone();
    let test = process(&["sh", "-c", "test -t 1; echo $?"]);
    let (io, mut stdout, _stderr) = shim.streams("pipes")?;
    shim.start_exec("pipes", &test, &io)?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"1\n");
    let (io, _input, mut output) = shim.terminal("terminal")?;
    shim.task.exec(&id, "terminal", &bundle::process(&["sh", "-c", "test -t 1; echo $?"]), &io)?;
    shim.task.start(&id, "terminal")?;
    ensure!(output.read_to_end(DEADLINE)? == b"0\r\n");

    let id = containerd.id("differs");
    let shim = Shim::start(containerd, &id, &spec(&id, &["true"]))?;
    let (io, _stdout, _stderr) = shim.streams("init")?;
    let error = shim.create(&io).map_or_else(|error| format!("{error:#}"), |pid| format!("created: {pid}"));
    let expected = if containerd.runtime() == Runtime::Husk { "process.terminal" } else { "tty" };
    ensure!(error.contains(expected), "{error}");
    Ok(())
}

#[test]
fn input_typed_before_the_process_reads_is_not_lost() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("typed");
    let shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", "sleep 1; read a; read b; echo \"<$a><$b>\""]))?;
    let (io, mut input, mut output) = shim.terminal("init")?;
    input.write_all(b"one\ntwo\n")?;
    shim.create_and_start(&io)?;
    let text = String::from_utf8(output.read_to_end(DEADLINE)?)?;
    ensure!(text.ends_with("<one><two>\r\n"), "{text:?}");
    ensure!(shim.task.wait(&id, "")? == 0);
    Ok(())
}
