//! `husk exec` and the console's shell, as an operator uses them in debug mode. Without debug mode, neither exists.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::built;
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::{Configured, Containerd, NAMESPACE};
use husk_tests::debug::{IN_DEBUG_MODE, panic_kernel, run_in_vm};
use husk_tests::operator::command as husk;
use husk_tests::process;
use husk_tests::pty::Pty;

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn husk_exec_runs_a_command_in_the_vm_with_streams_and_exit_code() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&IN_DEBUG_MODE, "exec", &["sleep", "1000"])?;
    let id = container.id();
    let run = |args: &[&str], stdin| run_in_vm(containerd, id, args, stdin);
    let script = |script: &str| run(&["sh", "-c", script], None);

    // In the VM, not in the container: the init is PID 1, and the container's process is visible.
    let output =
        script("cat /proc/1/comm; echo err >&2; ps -o args | grep -c '^sleep 1000$'; exit 7")?.expect_code(7)?;
    ensure!((output.text().as_str(), output.errors().as_str()) == ("init\n1", "err\n"), "{output}");
    let bytes: Vec<u8> = (0..262_144_u32).flat_map(|n| (n ^ 0x0a0d_0304).to_le_bytes()).collect();
    let copied = run(&["cat"], Some(bytes.clone()))?.ok()?;
    ensure!(copied.stdout == bytes, "{} of {} bytes came back", copied.stdout.len(), bytes.len());
    let much = run(&["head", "-c", "5000000", "/dev/zero"], None)?.ok()?;
    ensure!(much.stdout.len() == 5_000_000, "{} bytes", much.stdout.len());

    script("kill -9 $$")?.expect_code(137)?;
    let cases: [(&[&str], i32, &str); 4] = [
        (&["absent"], 127, "husk: guest: exec: \"absent\": executable file not found in $PATH\n"),
        (&["/proc"], 126, "husk: guest: exec: \"/proc\": permission denied\n"),
        (&[""], 127, "husk: guest: exec: \"\": executable file not found in $PATH\n"),
        (&["sh", "-c", "exit 125"], 125, ""),
    ];
    for (args, code, errors) in cases {
        let failed = run(args, None)?.expect_code(code)?;
        ensure!(failed.errors() == errors, "{failed}");
    }
    let exec = |args: &[&str], stdin: Option<&str>| {
        let arguments: Vec<&str> = ["exec"].iter().chain(args).copied().collect();
        command::run(husk(containerd, &arguments)?, stdin.map(|text| text.as_bytes().to_vec()), DEADLINE)
    };
    let output = exec(&["-e", "A=b", "-w", "/tmp", id, "--", "sh", "-c", "echo $A; pwd"], None)?.ok()?;
    ensure!(output.text() == "b\n/tmp", "{output}");
    let failed = exec(&["-w", "/none", id, "--", "true"], None)?.expect_code(125)?;
    ensure!(failed.errors().contains("chdir to \"/none\""), "{failed}");
    ensure!(exec(&["-n", id, "--", "cat"], Some("not for it"))?.ok()?.stdout.is_empty());
    let json = exec(&["--json", id, "--", "sh", "-c", "echo hi; exit 3"], None)?.expect_code(3)?;
    ensure!(json.text() == "{\"data\":\"aGkK\",\"stream\":\"stdout\"}\n{\"exit_code\":3}", "{json}");
    // Without a command, husk exec starts a shell, which reads its stdin here.
    ensure!(exec(&[id], Some("echo $((6 * 7)); exit 4\n"))?.expect_code(4)?.text() == "42");
    // A terminal for a client that has none and whose input ends.
    let typed = exec(&["-t", id, "--", "sh", "-c", "tty; cat"], Some("typed\n"))?.ok()?;
    // The terminal echoes the input when it arrives, before or after the first output.
    ensure!(typed.text().contains("/dev/pts/") && typed.text().matches("typed").count() == 2, "{typed}");
    let status = exec(&["nobody", "--", "true"], None)?.expect_code(125)?;
    ensure!(status.errors().contains("no sandbox \"nobody\""), "{status}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_process_in_the_vm_ends_with_its_client() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&IN_DEBUG_MODE, "gone", &["sleep", "1000"])?;
    let id = container.id();
    let running = || -> Result<usize> {
        let output = run_in_vm(containerd, id, &["ps", "-o", "args"], None)?.ok()?;
        Ok(output.text().lines().filter(|line| line.trim() == "sleep 4321").count())
    };
    // The first process reads none of its input, so its client is blocked writing; the second prints nothing.
    for script in ["sleep 4321 & sleep 4321 <&0", "trap '' HUP TERM; sleep 4321 & exec sleep 4321"] {
        let mut client = husk(containerd, &["exec", id, "--", "sh", "-c", script])?;
        let mut child = client.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut stdin = child.stdin.take().context("a stdin")?;
        let filled = std::thread::spawn(move || stdin.write_all(&vec![b'x'; 4 << 20]));
        let started = wait_for(DEADLINE, "both processes run", || {
            running().map(|count| count == 2).unwrap_or(true).then_some(())
        });
        process::kill_tree(child.id() as i32);
        child.wait()?;
        started?;
        ensure!(
            filled.join().is_ok_and(|written| written.is_err()),
            "husk accepted 4 MiB for a process that reads nothing"
        );
        wait_for(DEADLINE, "no process runs", || running().map(|count| count == 0).unwrap_or(false).then_some(()))?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_terminal_in_the_vm_works_and_the_users_own_terminal_is_restored() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&IN_DEBUG_MODE, "tty", &["sleep", "1000"])?;
    let mut shell = Pty::spawn(husk(containerd, &["exec", container.id()])?, 33, 101)?;
    // The arithmetic distinguishes the output from the echo of the command.
    shell.send("stty size; echo sized $((1 + 1))\n")?;
    let start = shell.expect("sized 2", DEADLINE)?;
    ensure!(start.contains("33 101") && !start.contains("job control turned off"), "{start}");
    shell.send("sh -c 'echo run $((2 + 2)); exec sleep 1000'\n")?;
    shell.expect("run 4", DEADLINE)?;
    shell.send("\x03")?;
    shell.send("echo interrupted $?\n")?;
    shell.expect("interrupted 130", DEADLINE)?;
    let script = "trap \"stty size; exit 3\" WINCH; echo set $((4 + 4)); while :; do sleep 0.1; done";
    shell.send(&format!("sh -c '{script}'\n"))?;
    shell.expect("set 8", DEADLINE)?;
    shell.resize(40, 120)?;
    shell.expect("40 120", DEADLINE)?;
    shell.send("exit 7\n")?;
    let (_, code) = shell.finish(DEADLINE)?;
    ensure!(code == 7, "{code}");

    // The user's terminal is restored after an exit, and after a signal to husk.
    // Only this container's client: others' clients run in this process too.
    let client = format!("husk exec {}", container.id());
    let exec = format!("{} exec {}", built("husk")?.display(), container.id());
    let script = format!(
        "before=$(stty -g); {exec} -- sh -c 'exit 3'; echo code $?; [ \"$before\" = \"$(stty -g)\" ] && echo restored 1
         {exec} -- sh -c 'echo be'\"''\"'gun; exec sleep 1000'; echo code $?; [ \"$before\" = \"$(stty -g)\" ] && echo restored 2"
    );
    let mut command = containerd.enter("sh");
    command.args(["-c", &script]);
    let mut shell = Pty::spawn(command, 24, 80)?;
    let first = shell.expect("restored 1", DEADLINE)?;
    ensure!(first.contains("code 3"), "{first}");
    shell.expect("begun", DEADLINE)?;
    let tool =
        process::descendants(containerd.pid()).into_iter().chain(process::descendants(std::process::id() as i32));
    let tool = tool.filter(|process| process.command.contains(&client)).find(|process| process.name == "husk");
    let tool = tool.context("no husk exec runs")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(tool.pid), nix::sys::signal::Signal::SIGTERM)?;
    let second = shell.expect("restored 2", DEADLINE)?;
    ensure!(second.contains("code 143"), "{second}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_console_has_a_shell_and_a_deliberate_crash_is_reported() -> Result<()> {
    let configured = Configured::start("debug = true\n")?;
    let containerd = &configured.containerd;
    // A container with CAP_MKNOD, which is in the default set, may open the serial port as its /dev/console.
    let spy = "mknod /dev/spy c 5 1 && exec cat /dev/spy >/tmp/typed";
    let container = containerd.detached(&[], "console", &["sh", "-c", spy])?;
    let id = container.id();
    let mut console = Pty::spawn(husk(containerd, &["console", id])?, 24, 80)?;
    for round in 1..=2 {
        console.send("\r")?;
        console.expect("# ", DEADLINE)?;
        console.send(&format!("tty; echo shell $(({round} + 40))\r"))?;
        let shown = console.expect(&format!("shell {}", 40 + round), DEADLINE)?;
        ensure!(shown.contains("/dev/hvc0"), "{shown}");
        console.send("exit\r")?;
        console.expect("built-in shell", DEADLINE)?;
    }
    console.send("\r~.")?;
    ensure!(console.finish(DEADLINE)?.1 == 0);
    // It reads nothing of what the operator has typed, and cannot open the shell's console.
    ensure!(container.script("cat /proc/1/comm /tmp/typed")? == "cat");
    let denied = container.script("mknod /dev/shell c 229 0; exec 2>&1; cat /dev/shell; true")?;
    ensure!(denied.contains("Operation not permitted"), "{denied}");
    let status = command::run(husk(containerd, &["status", id])?, None, DEADLINE)?.ok()?;
    ensure!(status.text().contains("on: a shell on the console, and husk exec"), "{status}");

    let crashed = panic_kernel(containerd, id)?.expect_code(125)?;
    ensure!(crashed.errors().contains("the VM has died: "), "{crashed}");
    let console = command::run(husk(containerd, &["logs", id])?, None, DEADLINE)?.ok()?;
    ensure!(console.text().contains("Kernel panic - not syncing: sysrq triggered crash"), "{console}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn without_debug_mode_there_is_neither_shell_nor_exec() -> Result<()> {
    let containerd = Containerd::shared()?;
    let container = containerd.detached(&[], "production", &["sleep", "1000"])?;
    let id = container.id();
    let failed = run_in_vm(containerd, id, &["true"], None)?.expect_code(125)?;
    ensure!(
        failed.errors().contains("not in debug mode") && failed.errors().contains("io.husk.debug=true"),
        "{failed}"
    );

    let folder = containerd.path("/run/husk").join(NAMESPACE).join(id);
    let mut console = UnixStream::connect(folder.join("console.sock"))?;
    console.write_all(b"\necho answer-$((1 + 1))\n")?;
    // The absence of a response cannot be observed directly, so wait for another container's whole life and the end of
    // the VM.
    containerd.script(&[], "meanwhile", "true")?;
    drop(container);
    let mut shown = String::new();
    console.set_read_timeout(Some(DEADLINE))?;
    console.read_to_string(&mut shown)?;
    ensure!(!shown.contains("answer-2"), "{shown}");

    // Nor is there a shell to run: the initramfs contains only the init and what it needs to start.
    let initrd = std::fs::read(built("initrd.img")?)?;
    let expected = ["dev", "dev/console", "init", "proc", "run", "sys", "tmp"].map(String::from);
    ensure!(names(&initrd)? == BTreeSet::from(expected), "{:?}", names(&initrd)?);
    let debug = names(&std::fs::read(built("initrd-debug.img")?)?)?;
    ensure!(["bin/busybox", "bin/sh", "init"].iter().all(|name| debug.contains(*name)), "{debug:?}");
    Ok(())
}

/// The file names in an initramfs. Its `newc` headers contain the sizes of contents and names in hexadecimal; both are
/// padded to 4 bytes.
fn names(initrd: &[u8]) -> Result<BTreeSet<String>> {
    const HEADER: usize = 110;
    let (mut names, mut at) = (BTreeSet::new(), 0_usize);
    loop {
        let header = initrd.get(at..at + HEADER).context("the archive has no trailer")?;
        ensure!(header.starts_with(b"070701"), "no header at {at}");
        let field = |number: usize| -> Result<usize> {
            Ok(usize::from_str_radix(std::str::from_utf8(&header[6 + 8 * number..][..8])?, 16)?)
        };
        let (size, length) = (field(6)?, field(11)?);
        let name = initrd.get(at + HEADER..at + HEADER + length - 1).context("a truncated name")?;
        if name == b"TRAILER!!!" {
            return Ok(names);
        }
        names.insert(String::from_utf8(name.to_vec())?);
        at = (at + HEADER + length).next_multiple_of(4) + size.next_multiple_of(4);
    }
}
