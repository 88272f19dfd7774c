//! Debug mode: a shell on the console and processes in the VM itself. Without debug mode, neither exists.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use husk_protos::PORT_STDIO;
use husk_protos::debug::{Process, StartProcessRequest};
use husk_protos::stdio::{InputChunk, StreamKind, StreamRequest};
use husk_protos::stdio_ttrpc::StdioClient;
use husk_protos::system::InfoResponse;
use husk_tests::guest::{Guest, STEP, call, config, debug_config, spec};
use tokio::time::timeout;
use ttrpc::{Code, context};

/// The shell's console, as a user in front of it sees it.
struct Shell {
    socket: UnixStream,
    unmatched: String,
}

impl Shell {
    fn of(guest: &Guest) -> Result<Self> {
        let socket = guest.vm.shell()?;
        socket.set_read_timeout(Some(STEP))?;
        Ok(Self { socket, unmatched: String::new() })
    }

    fn send(&mut self, text: &str) -> Result<()> {
        self.socket.write_all(text.as_bytes()).with_context(|| format!("type {text:?}"))
    }

    /// Reads until `needle` appears and returns the output before it.
    fn expect(&mut self, needle: &str) -> Result<String> {
        loop {
            if let Some((before, rest)) = self.unmatched.split_once(needle) {
                let before = before.to_owned();
                self.unmatched = rest.to_owned();
                return Ok(before);
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(length @ 1..) => self.unmatched.push_str(&String::from_utf8_lossy(&bytes[..length])),
                other => bail!("no {needle:?} ({other:?}); output: {:?}", self.unmatched),
            }
        }
    }
}

fn status_of<T>(result: Result<T>) -> Result<(Code, String)> {
    match result.err().map(|error| error.downcast()) {
        Some(Ok(ttrpc::Error::RpcStatus(status))) => Ok((status.code(), status.message)),
        Some(other) => bail!("no error with a status: {other:?}"),
        None => bail!("the call succeeded"),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn a_shell_runs_on_the_console_and_respawns_when_it_exits() -> Result<()> {
    let guest = Guest::boot_with(debug_config()?).await?;
    let mut shell = Shell::of(&guest)?;
    // Output before the connection is lost, so the test sends a command instead of waiting for a prompt.
    shell.send("tty; echo $((6 * 7)) $TERM $HOME $PATH\n")?;
    shell.expect("/dev/hvc0")?;
    shell.expect("42 vt100 / /bin:/sbin:/usr/bin:/usr/sbin")?;
    shell.send("cat /proc/self/oom_score_adj /proc/self/personality /proc/self/cgroup; echo e''nd\n")?;
    let own = shell.expect("end\r\n")?;
    ensure!(own.ends_with("0\r\n00000000\r\n0::/debug/shell\r\n"), "{own:?}");

    // Job control: Ctrl-C interrupts the command, not the shell.
    shell.send("echo $(( 40 + 4 )); sleep 1000\n")?;
    shell.expect("\r\n44\r\n")?;
    shell.send("\x03")?;
    shell.expect("# ")?;
    shell.send("echo $? d''one\n")?;
    shell.expect("130 done")?;

    for (number, end) in ["exit", "exit 3", "kill -9 $$"].into_iter().enumerate() {
        shell.send(&format!("{end}\n"))?;
        // The next shell starts without login and has the terminal to itself. Input typed between two shells may be
        // lost.
        shell.expect("built-in shell (ash)").with_context(|| guest.vm.console())?;
        shell.expect("# ")?;
        shell.send(&format!("echo shell-$(({number} + 100))\n"))?;
        shell.expect(&format!("\r\nshell-{}", 100 + number)).with_context(|| guest.vm.console())?;
    }
    ensure!(guest.info().await?.zombies == 0);
    // PID 1 and containers work as usual.
    ensure!(guest.run("c", &spec(&["sh", "-c", "exit 7"])).await?.0 == 7);

    shell.send("echo $(( 50 + 5 )); sleep 1000\n")?;
    shell.expect("\r\n55\r\n")?;
    // The shell and its program end with the VM.
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn debug_mode_logs_once_that_the_initramfs_has_no_shell() -> Result<()> {
    let mut config = config()?;
    config.kernel_parameters = "husk.debug=1".into();
    let guest = Guest::boot_with(config).await?;
    let (code, message) = status_of(guest.start_in_vm(&["sh"], false).await)?;
    ensure!(
        code == Code::NOT_FOUND && message == "exec: \"sh\": executable file not found in $PATH",
        "{code:?} {message}"
    );
    let console = guest.shut_down().await?;
    ensure!(console.matches("no shell on the console").count() == 1, "{console}");
    Ok(())
}

#[tokio::test]
async fn without_debug_mode_no_shell_runs_and_exec_is_rejected() -> Result<()> {
    // Even if the initramfs contains a shell.
    let guest =
        Guest::boot_with(husk_tests::vm::VmConfig { kernel_parameters: String::new(), ..debug_config()? }).await?;
    let mut shell = Shell::of(&guest)?;
    shell.send("echo answer-$((1 + 1))\n")?;
    let (code, message) = status_of(guest.start_in_vm(&["sh"], false).await)?;
    ensure!(code == Code::UNIMPLEMENTED, "{code:?} {message}");
    // By the end of a container's life, a shell would have responded.
    ensure!(guest.run("c", &spec(&["ls", "/sys/fs/cgroup/debug"])).await?.0 != 0);
    let mut console = guest.shut_down().await?;
    shell.socket.read_to_string(&mut console)?;
    ensure!(!console.contains("answer-2"), "{console}");
    Ok(())
}

#[tokio::test]
async fn processes_in_the_vm_have_streams_and_exit_codes() -> Result<()> {
    let guest = Guest::boot_with(debug_config()?).await?;
    guest.run_in_vm(&["true"], None).await?;
    let before = guest.info().await?;

    let input: Vec<u8> = (0..262_144_u32).flat_map(u32::to_le_bytes).collect();
    let (status, stdout, stderr) = guest.run_in_vm(&["cat"], Some(&input)).await?;
    ensure!((status, stdout == input, stderr.is_empty()) == (0, true, true), "{status}, {} bytes", stdout.len());
    let (_, stdout, _) = guest.run_in_vm(&["head", "-c", "5000000", "/dev/zero"], None).await?;
    ensure!(stdout.len() == 5_000_000, "{} bytes", stdout.len());

    let script = "echo out; echo err >&2; cat; tty; pwd; echo $HOME; cat /proc/self/oom_score_adj /proc/self/personality; exit 7";
    let (status, stdout, stderr) = guest.run_in_vm(&["sh", "-c", script], None).await?;
    let expected = "out\nnot a tty\n/\n/\n0\n00000000\n";
    ensure!(
        (status, text(&stdout).as_str(), text(&stderr).as_str()) == (7, expected, "err\n"),
        "{status} {}",
        text(&stdout)
    );
    // Rust's runtime, with which every program is started, ignores SIGPIPE; no program may inherit that.
    ensure!(
        guest.run_in_vm(&["sh", "-c", "kill -PIPE $$; echo survived"], None).await?.0 == 128 + libc::SIGPIPE as u32
    );
    for (signal, status) in [("KILL", 137), ("TERM", 143)] {
        ensure!(guest.run_in_vm(&["sh", "-c", &format!("kill -{signal} $$")], None).await?.0 == status);
    }

    let start = async |args: &[&str], cwd: &str| {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let request = StartProcessRequest { args, cwd: cwd.into(), ..Default::default() };
        status_of(guest.debug.start(call(), &request).await.map_err(Into::into))
    };
    let cases = [
        (start(&["absent"], "").await?, Code::NOT_FOUND, "exec: \"absent\": executable file not found in $PATH"),
        (start(&["/no/such"], "").await?, Code::NOT_FOUND, "exec: \"/no/such\": no such file or directory"),
        (start(&["/proc"], "").await?, Code::FAILED_PRECONDITION, "exec: \"/proc\": permission denied"),
        (start(&["true"], "/none").await?, Code::INVALID_ARGUMENT, "chdir to \"/none\": No such file or directory"),
        (
            start(&["a\0b"], "").await?,
            Code::INVALID_ARGUMENT,
            "an argument or environment variable contains a NUL byte",
        ),
        (start(&[], "").await?, Code::INVALID_ARGUMENT, "args must name a program"),
    ];
    for ((code, message), expected_code, expected) in cases {
        ensure!(code == expected_code && message == expected, "{code:?} {message}, expected {expected}");
    }
    ensure!(status_of(guest.wait_in_vm("77").await)?.0 == Code::NOT_FOUND);
    expect_nothing_left(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

/// Waits until PID 1 has no more descriptors, children and zombies than before. At that time, a connection may still
/// have been closing.
async fn expect_nothing_left(guest: &Guest, before: &InfoResponse) -> Result<()> {
    let began = Instant::now();
    loop {
        let after = guest.info().await?;
        let same_processes = (after.processes, after.zombies) == (before.processes, before.zombies);
        if same_processes && after.init_open_fds <= before.init_open_fds {
            break;
        }
        ensure!(began.elapsed() < STEP, "before: {before}\nafter: {after}");
    }
    let (_, groups, _) = guest.run_in_vm(&["sh", "-c", "ls -d /sys/fs/cgroup/debug/*/"], None).await?;
    ensure!(text(&groups).lines().count() == 2, "expected the cgroups of ls and of the shell: {}", text(&groups));
    Ok(())
}

#[tokio::test]
async fn children_of_a_process_in_the_vm_end_with_it() -> Result<()> {
    let guest = Guest::boot_with(debug_config()?).await?;
    guest.run_in_vm(&["true"], None).await?;
    let before = guest.info().await?;
    let running = async || -> Result<usize> {
        let (_, processes, _) = guest.run_in_vm(&["ps", "-o", "args"], None).await?;
        Ok(text(&processes).lines().filter(|line| line.trim() == "sleep 1234").count())
    };

    // A child in the background keeps the streams open. Neither the streams' end nor the exit may wait for it.
    let (status, stdout, _) = guest.run_in_vm(&["sh", "-c", "sleep 1234 & echo started; exit 5"], None).await?;
    ensure!((status, text(&stdout).as_str(), running().await?) == (5, "started\n", 0));

    // `end` kills even processes that ignore signals.
    let id = guest.start_in_vm(&["sh", "-c", "trap '' HUP TERM; setsid sleep 1234 & sleep 1234"], false).await?;
    let began = Instant::now();
    while running().await? != 2 {
        ensure!(began.elapsed() < STEP, "the processes do not run");
    }
    let (waited, ended) = tokio::join!(guest.wait_in_vm(&id), guest.end_in_vm(&id));
    ensure!((ended?, waited?) == ((), 137) && running().await? == 0);
    guest.end_in_vm(&id).await.context("a second end")?;

    let id = guest.start_in_vm(&["sh", "-c", "trap 'exit 9' USR1; while :; do sleep 1; done"], false).await?;
    let signal = async |signal| {
        let request = Process { id: id.clone(), signal, ..Default::default() };
        guest.debug.signal(call(), &request).await
    };
    ensure!(status_of(signal(65).await.map_err(Into::into))?.0 == Code::INVALID_ARGUMENT);
    signal(libc::SIGTERM as u32).await?;
    ensure!(guest.wait_in_vm(&id).await? == 143);
    ensure!(status_of(signal(libc::SIGTERM as u32).await.map_err(Into::into))?.0 == Code::NOT_FOUND);
    guest.end_in_vm(&id).await?;
    expect_nothing_left(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn a_process_in_the_vm_can_have_its_own_terminal() -> Result<()> {
    let guest = Guest::boot_with(debug_config()?).await?;
    guest.run_in_vm(&["true"], None).await?;
    let before = guest.info().await?;
    let request = StartProcessRequest {
        args: vec!["sh".into()],
        env: vec!["TERM=xterm".into()],
        terminal: true,
        height: 30,
        width: 100,
        ..Default::default()
    };
    let id = guest.debug.start(call(), &request).await?.id;

    let streams =
        (StdioClient::new(guest.connect(PORT_STDIO).await?), StdioClient::new(guest.connect(PORT_STDIO).await?));
    let kind = StreamKind::STREAM_KIND_STDOUT.into();
    let request = StreamRequest { exec_id: id.clone(), kind, ..Default::default() };
    let mut output = streams.0.output(context::with_timeout(0), &request).await?;
    let input = streams.1.input(context::with_timeout(0)).await?;
    input.send(&InputChunk { exec_id: id.clone(), ..Default::default() }).await?;
    let mut output_text = String::new();
    let mut type_and_expect = async |typed: &str, expected: &str| -> Result<()> {
        input.send(&InputChunk { data: typed.into(), ..Default::default() }).await?;
        while !output_text.contains(expected) {
            match timeout(STEP, output.recv()).await {
                Ok(Ok(Some(chunk))) => output_text.push_str(&text(&chunk.data)),
                other => bail!("no {expected:?} ({other:?}); output: {output_text:?}"),
            }
        }
        output_text.clear();
        Ok(())
    };
    type_and_expect("tty; stty size; echo $TERM\n", "/dev/pts/0\r\n30 100\r\nxterm\r\n").await?;
    guest.debug.resize(call(), &Process { id: id.clone(), height: 50, width: 132, ..Default::default() }).await?;
    type_and_expect("stty size\n", "50 132\r\n").await?;
    type_and_expect("echo $((20 + 2)); sleep 1234\n", "\r\n22\r\n").await?;
    type_and_expect("\x03", "# ").await?;
    type_and_expect("echo $? d''one\n", "130 done").await?;

    // The client's window is closed while a command runs.
    type_and_expect("echo $((30 + 3)); sleep 1234\n", "\r\n33\r\n").await?;
    let (waited, ended) = tokio::join!(guest.wait_in_vm(&id), guest.end_in_vm(&id));
    ended?;
    let status = waited?;
    ensure!(status == 128 + libc::SIGHUP as u32, "{status}");
    let (_, processes, _) = guest.run_in_vm(&["ps"], None).await?;
    ensure!(!text(&processes).contains("1234"), "{}", text(&processes));
    drop((streams, output, input));
    expect_nothing_left(&guest, &before).await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_operator_can_crash_the_guest() -> Result<()> {
    let mut guest = Guest::boot_with(debug_config()?).await?;
    guest.start_in_vm(&["sh", "-c", "echo c > /proc/sysrq-trigger"], false).await.ok();
    let guest = tokio::task::spawn_blocking(move || guest.vm.wait(STEP).map(|()| guest)).await??;
    let console = guest.vm.console();
    ensure!(console.contains("Kernel panic - not syncing: sysrq triggered crash"), "{console}");
    Ok(())
}
