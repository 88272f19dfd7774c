//! `ctr run -t`, `ctr task exec -t` and what a user in front of the terminal expects of them.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::Code;
use husk_tests::artifacts::Runtime;
use husk_tests::bundle;
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

/// Types what needs a terminal with job control in a shell that has just been started, and leaves it with status 7.
fn use_shell(shell: &mut Pty) -> Result<()> {
    // The arithmetic tells an answer from the echo of the question.
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
fn a_shell_of_ctr_run_has_a_terminal_with_job_control() -> Result<()> {
    let containerd = Containerd::shared()?;
    let run = containerd.run(&["--tty"], &containerd.id("shell"), &["sh"]);
    let mut shell = Pty::spawn(run.command(), 33, 101)?;
    use_shell(&mut shell)?;
    let (rest, status) = shell.finish(DEADLINE)?;
    ensure!(status == 7, "status {status}: {rest}");
    Ok(())
}

#[test]
fn a_shell_of_ctr_exec_has_a_terminal_with_job_control() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "shells", &["sleep", "1000"])?;
    // Twice: the first one's terminal must be free again.
    for _ in 0..2 {
        let mut shell = exec_in_terminal(&container, &["sh"])?;
        use_shell(&mut shell)?;
        let (rest, status) = shell.finish(DEADLINE)?;
        ensure!(status == 7, "status {status}: {rest}");
    }
    let terminals = container.script("ls /dev/pts")?;
    ensure!(terminals == "ptmx", "terminals are left: {terminals}");
    Ok(())
}

#[test]
fn a_full_screen_program_draws_for_the_terminals_size() -> Result<()> {
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
fn the_size_is_there_from_the_first_moment() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("size");
    let mut with_size = spec(&id, &["sh", "-c", "stty size; exec sleep 1000"]);
    with_size["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    let shim = Shim::start(containerd, &id, &with_size)?;
    let (io, _typed, mut shown) = shim.terminal("init")?;
    shim.create(&io)?;
    shim.task.resize(&id, "", 31, 111)?;
    shim.task.start(&id, "")?;
    let size = shown.read_until("\n", DEADLINE)?;
    ensure!(size == "31 111\r\n", "asked for before the start: {size:?}");

    let mut stty = process(&["stty", "size"]);
    stty["consoleSize"] = json!({"height": 30, "width": 100});
    for (name, resize, wanted) in [("spec", None, "30 100\r\n"), ("asked", Some((32, 112)), "32 112\r\n")] {
        if resize.is_some()
            && !containerd.runtime().is_husk_or_tell("the_size_is_there_from_the_first_moment, of an exec")
        {
            // runc's shim takes the call and forgets it.
            continue;
        }
        let (io, _typed, mut shown) = shim.terminal(name)?;
        shim.task.exec(&id, name, &stty, &io)?;
        if let Some((height, width)) = resize {
            shim.task.resize(&id, name, height, width)?;
        }
        shim.task.start(&id, name)?;
        let size = shown.read_until("\n", DEADLINE)?;
        ensure!(size == wanted, "{name}: {size:?}");
        ensure!(shim.task.wait(&id, name)? == 0);
        shim.task.delete(&id, name)?;
    }
    Ok(())
}

#[test]
fn state_tells_of_the_terminal_and_only_a_process_that_is_there_is_resized() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "resizes")?;
    let id = shim.bundle.id.clone();
    ensure!(!shim.task.state(&id, "")?.terminal);
    // Nothing to change, and no error either.
    shim.task.resize(&id, "", 10, 20)?;

    let (io, _typed, mut shown) = shim.terminal("t")?;
    shim.task.exec(&id, "t", &process(&["true"]), &io)?;
    ensure!(shim.task.state(&id, "t")?.terminal);
    shim.task.start(&id, "t")?;
    ensure!(shim.task.wait(&id, "t")? == 0);
    ensure!(shown.read_to_end(DEADLINE)?.is_empty());
    let after_its_end = shim.task.resize(&id, "t", 10, 20);
    ensure!(after_its_end.is_err(), "a process that has ended was resized");
    shim.task.delete(&id, "t")?;
    let deleted = shim.task.resize(&id, "t", 10, 20);
    ensure!(code(&deleted) == Some(Code::NOT_FOUND), "{deleted:?}");
    Ok(())
}

#[test]
fn what_is_shown_right_before_the_end_is_complete() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "last-words")?;
    let id = shim.bundle.id.clone();
    let wanted: String = (1..=3000).map(|n| format!("{n}\r\n")).collect();
    for round in 0..10 {
        let exec = format!("e{round}");
        let (io, _typed, mut shown) = shim.terminal(&exec)?;
        shim.task.exec(&id, &exec, &process(&["seq", "1", "3000"]), &io)?;
        shim.task.start(&id, &exec)?;
        let got = String::from_utf8(shown.read_to_end(DEADLINE)?)?;
        ensure!(got == wanted, "round {round}: {} of {} bytes", got.len(), wanted.len());
        ensure!(shim.task.wait(&id, &exec)? == 0);
        shim.task.delete(&id, &exec)?;
    }
    Ok(())
}

#[test]
fn a_terminal_belongs_to_the_user_who_has_it() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("owner");
    let script = "echo mine > $(tty) && stat -c %u $(tty) && exec sleep 1000";
    let mut of_user = spec(&id, &["sh", "-c", script]);
    of_user["process"]["user"] = json!({"uid": 1234, "gid": 1234});
    let shim = Shim::start(containerd, &id, &of_user)?;
    let (io, _typed, mut shown) = shim.terminal("init")?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    let text = shown.read_until("1234\r\n", DEADLINE)?;
    ensure!(text == "mine\r\n1234\r\n", "{text:?}");

    let mut exec = process(&["sh", "-c", "echo mine > $(tty) && stat -c %u $(tty)"]);
    exec["user"] = json!({"uid": 4321, "gid": 4321});
    let (io, _typed, mut shown) = shim.terminal("exec")?;
    shim.task.exec(&id, "exec", &exec, &io)?;
    shim.task.start(&id, "exec")?;
    let text = String::from_utf8(shown.read_to_end(DEADLINE)?)?;
    ensure!(text == "mine\r\n4321\r\n", "{text:?}");
    Ok(())
}

#[test]
fn the_console_of_a_container_is_its_terminal() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("console");
    let shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", "echo by name > /dev/console; exec sleep 1000"]))?;
    let (io, _typed, mut shown) = shim.terminal("init")?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    ensure!(shown.read_until("\n", DEADLINE)? == "by name\r\n");
    Ok(())
}

#[test]
fn what_is_left_in_a_terminal_is_hung_up_when_its_session_ends() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "hang-up", &["sleep", "1000"])?;
    let mut shell = exec_in_terminal(&container, &["sh"])?;
    // A child in the foreground outlives its shell, the session's leader.
    let child = "trap \"echo hung up > /told; exit\" HUP; echo ready $((1 + 1)); while :; do sleep 0.1; done";
    shell.send("echo $$ > /shell\n")?;
    shell.send(&format!("sh -c '{child}'\n"))?;
    shell.expect("ready 2", DEADLINE)?;
    container.script("kill -9 $(cat /shell)")?;
    let (rest, status) = shell.finish(DEADLINE)?;
    ensure!(status == 137, "{status}: {rest}");
    let told = container.script("until [ -s /told ]; do sleep 0.1; done; cat /told")?;
    ensure!(told == "hung up", "{told}");
    Ok(())
}

#[test]
fn a_client_that_goes_leaves_the_process_alone_and_another_takes_over() -> Result<()> {
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
fn the_requests_word_on_the_terminal_counts_for_an_exec_and_the_spec_must_agree_for_a_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "differ")?;
    let id = shim.bundle.id.clone();
    let test = process(&["sh", "-c", "test -t 1; echo $?"]);
    let (io, mut stdout, _stderr) = shim.streams("pipes")?;
    shim.task.exec(&id, "pipes", &test, &io)?;
    shim.task.start(&id, "pipes")?;
    ensure!(stdout.read_to_end(DEADLINE)? == b"1\n");
    let (io, _typed, mut shown) = shim.terminal("terminal")?;
    shim.task.exec(&id, "terminal", &bundle::process(&["sh", "-c", "test -t 1; echo $?"]), &io)?;
    shim.task.start(&id, "terminal")?;
    ensure!(shown.read_to_end(DEADLINE)? == b"0\r\n");

    let id = containerd.id("differs");
    let shim = Shim::start(containerd, &id, &spec(&id, &["true"]))?;
    let (io, _stdout, _stderr) = shim.streams("init")?;
    let refused = shim.create(&io).map_or_else(|error| format!("{error:#}"), |pid| format!("created: {pid}"));
    let wanted = if containerd.runtime() == Runtime::Husk { "process.terminal" } else { "tty" };
    ensure!(refused.contains(wanted), "{refused}");
    Ok(())
}

#[test]
fn keys_typed_before_anybody_reads_them_are_not_lost() -> Result<()> {
    let containerd = Containerd::shared()?;
    let id = containerd.id("typed");
    let shim = Shim::start(containerd, &id, &spec(&id, &["sh", "-c", "sleep 1; read a; read b; echo \"<$a><$b>\""]))?;
    let (io, mut typed, mut shown) = shim.terminal("init")?;
    typed.write_all(b"one\ntwo\n")?;
    shim.create(&io)?;
    shim.task.start(&id, "")?;
    let text = String::from_utf8(shown.read_to_end(DEADLINE)?)?;
    ensure!(text.ends_with("<one><two>\r\n"), "{text:?}");
    ensure!(shim.task.wait(&id, "")? == 0);
    Ok(())
}
