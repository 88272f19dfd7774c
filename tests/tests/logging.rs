//! Output to files and to logging programs, as with `nerdctl run -d` and `ctr run --log-uri`, with and without a
//! terminal.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{self, Code};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::Containerd;
use husk_tests::husk_only;
use husk_tests::process;
use husk_tests::shim::{Shim, Streams, code};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// A well-behaved logging program: it records its arguments, separates both streams, and exits at their end, not at the
/// signal.
const LOGGER: &str = r#"
trap '' TERM
echo "$CONTAINER_NAMESPACE/$CONTAINER_ID $*" >"$dir/started"
cat <&3 >>"$dir/stdout" 5>&- & cat <&4 >>"$dir/stderr" 5>&- &
exec 3<&- 4<&- 5>&-
wait
echo done >"$dir/done"
"#;

/// A logging program in its own directory, and the files that it writes.
struct Logger(tempfile::TempDir);

impl Logger {
    /// Creates the program. `script` finds its directory in `$dir`.
    fn new(script: &str) -> Result<Self> {
        let logger = Self(tempfile::tempdir()?);
        let text = format!("#!/bin/bash\ndir={}\n{script}", logger.0.path().display());
        fs::write(logger.program(), text)?;
        fs::set_permissions(logger.program(), fs::Permissions::from_mode(0o755))?;
        Ok(logger)
    }

    fn program(&self) -> PathBuf {
        self.path("logger")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn uri(&self) -> String {
        format!("binary://{}", self.program().display())
    }

    /// Waits until the program's file of that name is not empty, and returns its content.
    fn wrote(&self, name: &str) -> Result<String> {
        wait_for(DEADLINE, &format!("the logger writes {name}"), || {
            fs::read_to_string(self.path(name)).ok().filter(|text| !text.is_empty())
        })
    }

    /// The number of its processes below `ancestor`.
    fn processes(&self, ancestor: i32) -> usize {
        let program = self.program().display().to_string();
        process::descendants(ancestor).iter().filter(|process| process.command.contains(&program)).count()
    }
}

fn both(uri: &str) -> Streams {
    Streams { stdout: uri.to_owned(), stderr: uri.to_owned(), ..Streams::default() }
}

fn in_terminal(uri: &str) -> Streams {
    Streams { terminal: true, ..both(uri) }
}

fn spec(id: &str, script: &str) -> Value {
    bundle::spec(id, &["sh", "-c", script])
}

fn spec_with_terminal(id: &str, script: &str) -> Value {
    let mut spec = spec(id, script);
    spec["process"]["terminal"] = json!(true);
    spec
}

fn process_with_terminal(script: &str) -> Value {
    let mut process = bundle::process(&["sh", "-c", script]);
    process["terminal"] = json!(true);
    process
}

fn sequence(last: usize, end: &str) -> String {
    (1..=last).map(|n| format!("{n}{end}")).collect()
}

fn error_of<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Result<(Option<Code>, String)> {
    let code = code(&result);
    match result.err().context("the call succeeded")? {
        ttrpc::Error::RpcStatus(status) => Ok((code, status.message)),
        other => Err(other.into()),
    }
}

#[test]
fn a_logging_program_gets_separate_streams_arguments_and_environment() -> Result<()> {
    let containerd = Containerd::shared()?;
    let logger = Logger::new(LOGGER)?;
    let id = containerd.id("logged");
    let script = "seq 1 200000; seq 1 1000 >&2; exit 3";
    let shim = Shim::start(containerd, &id, &spec(&id, script))?;
    shim.create(&both(&format!("{}?file=/var/log/a%20b", logger.uri())))?;
    let started = logger.wrote("started")?;
    ensure!(started == format!("husk-test/{id} file /var/log/a b\n"), "{started:?}");
    shim.task.start(&id, "")?;
    ensure!(shim.task.wait(&id, "")? == 3);
    shim.task.delete(&id, "")?;
    logger.wrote("done").context("the logger did not reach the end of the output")?;
    ensure!(fs::read_to_string(logger.path("stdout"))? == sequence(200_000, "\n"));
    ensure!(fs::read_to_string(logger.path("stderr"))? == sequence(1000, "\n"));
    Ok(())
}

#[test]
fn ctr_runs_containers_and_execs_with_a_logging_program() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (logger, exec_logger) = (Logger::new(LOGGER)?, Logger::new(LOGGER)?);
    let uri = format!("{}?container=yes", logger.uri());
    let container = containerd.detached(&["--log-uri", &uri], "ctr-log", &["sh", "-c", "echo out; sleep 1000"])?;
    ensure!(logger.wrote("stdout")? == "out\n");
    ensure!(logger.wrote("started")?.ends_with(" container yes\n"));
    let exec = containerd.ctr(["task", "exec", "--log-uri"]).arg(exec_logger.uri()).args(["--exec-id", "e"]);
    exec.arg(container.id()).args(["sh", "-c", "echo from exec"]).ok()?;
    ensure!(exec_logger.wrote("stdout")? == "from exec\n");
    ensure!(logger.processes(containerd.pid()) > 0);
    container.kill_and_wait()?;
    container.delete_task()?;
    logger.wrote("done")?;
    Ok(())
}

#[test]
fn a_log_file_is_created_appended_to_and_shared_by_both_streams() -> Result<()> {
    let containerd = Containerd::shared()?;
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("new/folder/log");
    fs::create_dir_all(folder.path().join("new/folder"))?;
    fs::write(&log, "before\n")?;
    let uri = format!("file://{}", log.display());
    let id = containerd.id("file");
    let shim = Shim::start(containerd, &id, &spec(&id, "seq 1 1200000; echo error >&2; exit 3"))?;
    shim.create(&both(&uri))?;
    shim.task.start(&id, "")?;
    ensure!(shim.task.wait(&id, "")? == 3);
    shim.task.delete(&id, "")?;
    let text = fs::read_to_string(&log)?;
    ensure!(text.len() == 7 + sequence(1_200_000, "\n").len() + 6, "{} bytes", text.len());
    let appended = text.strip_prefix("before\n").context("the output was not appended")?;
    ensure!(
        appended.matches("error\n").count() == 1 && appended.replacen("error\n", "", 1) == sequence(1_200_000, "\n")
    );

    let other = folder.path().join("made/by/the/shim");
    let uri = format!("file://{}", other.display());
    let _container = containerd.detached(&["--log-uri", &uri], "file-made", &["sh", "-c", "echo made; sleep 1000"])?;
    wait_for(DEADLINE, "the file is written", || fs::read_to_string(&other).ok().filter(|text| text == "made\n"))?;
    Ok(())
}

#[test]
fn a_terminals_output_can_go_to_a_file_a_logging_program_or_nowhere() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "terminals")?;
    let id = shim.bundle.id.clone();
    let expected = sequence(3000, "\r\n");
    let run = |exec: &str, io: &Streams| -> Result<u32> {
        shim.task.exec(&id, exec, &process_with_terminal("seq 1 3000; exit 4"), io)?;
        shim.task.start(&id, exec)?;
        let status = shim.task.wait(&id, exec)?;
        shim.task.delete(&id, exec)?;
        Ok(status)
    };
    let logger = Logger::new(LOGGER)?;
    ensure!(run("binary", &in_terminal(&logger.uri()))? == 4);
    logger.wrote("done")?;
    ensure!(fs::read_to_string(logger.path("stdout"))? == expected);
    ensure!(fs::read_to_string(logger.path("stderr"))?.is_empty());
    // runc's shim mistakes a file URI for a fifo's path, and fails without an output.
    husk_only!();
    let log = logger.path("log");
    ensure!(run("file", &in_terminal(&format!("file://{}", log.display())))? == 4);
    ensure!(fs::read_to_string(&log)? == expected);
    // Far more output than a terminal buffers: husk must read and discard it.
    ensure!(run("nowhere", &in_terminal(""))? == 4);
    Ok(())
}

#[test]
fn a_container_with_a_terminal_can_use_a_logging_program() -> Result<()> {
    let containerd = Containerd::shared()?;
    let logger = Logger::new(LOGGER)?;
    let id = containerd.id("tty-logged");
    let shim = Shim::start(containerd, &id, &spec_with_terminal(&id, "tty; exit 5"))?;
    shim.create(&in_terminal(&logger.uri()))?;
    shim.task.start(&id, "")?;
    ensure!(shim.task.wait(&id, "")? == 5);
    shim.task.delete(&id, "")?;
    logger.wrote("done")?;
    ensure!(fs::read_to_string(logger.path("stdout"))? == "/dev/pts/0\r\n");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn unknown_output_uris_are_rejected_with_stream_and_value() -> Result<()> {
    let containerd = Containerd::shared()?;
    let cases = [
        (Streams { stderr: "syslog://local".into(), ..Streams::default() }, "stderr \"syslog://local\""),
        (Streams { stdout: "binary://logger".into(), ..Streams::default() }, "stdout \"binary://logger\""),
        (Streams { stdin: "file:///etc/passwd".into(), ..Streams::default() }, "stdin \"file:///etc/passwd\""),
        (Streams { stdout: "/no/such/fifo".into(), ..Streams::default() }, "stdout: open /no/such/fifo"),
        (both("file:///proc/version/log"), "stdout: open /proc/version/log"),
    ];
    for (io, expected) in &cases {
        // A new shim for each case: a shim exits after a failed Create of its only container.
        let id = containerd.id("scheme");
        let shim = Shim::start(containerd, &id, &spec(&id, "sleep 1000"))?;
        let created: ttrpc::Result<api::CreateTaskResponse> = shim.task.call("Create", &shim.create_request(io));
        let (code, text) = error_of(created)?;
        ensure!(code == Some(Code::INVALID_ARGUMENT) && text.contains(expected), "{text}");
    }
    let shim = Shim::idle(containerd, "scheme-exec")?;
    let id = shim.bundle.id.clone();
    for (io, expected) in &cases[..3] {
        let error = shim.task.exec(&id, "e", &bundle::process(&["true"]), io).err().context("Exec succeeded")?;
        let (code, text) = error_of(Err::<(), _>(error.downcast()?))?;
        ensure!(code == Some(Code::INVALID_ARGUMENT) && text.contains(expected), "{text}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_logging_program_that_does_not_become_ready_is_named_and_leaves_nothing_behind() -> Result<()> {
    let containerd = Containerd::shared()?;
    // runc's shim mistakes the program's exit for its readiness, and waits without a deadline.
    let shim = Shim::idle(containerd, "not-ready")?;
    let id = shim.bundle.id.clone();
    let cases = [
        ("exit 3", "exited with status 3 before it was ready"),
        ("kill -9 $$", "was killed by signal 9 before it was ready"),
        ("sleep 1000 & wait", "did not report readiness within 10s"),
    ];
    for (index, (script, expected)) in cases.into_iter().enumerate() {
        let logger = Logger::new(script)?;
        let exec = format!("e{index}");
        shim.task.exec(&id, &exec, &bundle::process(&["true"]), &both(&logger.uri()))?;
        let (_, text) = error_of(shim.task.start(&id, &exec))?;
        let program = logger.program().display().to_string();
        ensure!(text.contains(expected) && text.contains(&program) && text.contains("stdout"), "{text}");
        wait_for(DEADLINE, "the logger is gone", || (logger.processes(containerd.pid()) == 0).then_some(()))?;
    }
    shim.task.exec(&id, "absent", &bundle::process(&["true"]), &both("binary:///no/such/logger"))?;
    let (_, text) = error_of(shim.task.start(&id, "absent"))?;
    ensure!(text.contains("/no/such/logger") && text.contains("No such file"), "{text}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_logging_program_that_exits_early_stalls_nothing() -> Result<()> {
    let containerd = Containerd::shared()?;
    // With runc, the process itself writes to the broken pipe and is killed by SIGPIPE.
    let shim = Shim::idle(containerd, "dies")?;
    let id = shim.bundle.id.clone();
    let logger = Logger::new("head -c 1000 <&3 >$dir/stdout 3<&- 4<&- 5>&- & exec 3<&- 4<&- 5>&-; wait")?;
    shim.task.exec(&id, "e", &bundle::process(&["sh", "-c", "seq 1 300000; exit 6"]), &both(&logger.uri()))?;
    shim.task.start(&id, "e")?;
    ensure!(shim.task.wait(&id, "e")? == 6);
    ensure!(logger.wrote("stdout")?.len() == 1000);
    wait_for(DEADLINE, "the shim logs the lost output", || shim.log().contains("output is lost").then_some(()))?;
    Ok(())
}

#[test]
fn a_logging_program_that_does_not_read_stalls_nothing_and_ends_with_its_container() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "unread-log")?;
    let id = shim.bundle.id.clone();
    let logger =
        Logger::new("trap 'echo terminated >$dir/terminated; exit' TERM; exec 5>&-; while :; do sleep 0.05; done")?;
    shim.start_exec("e", &bundle::process(&["sh", "-c", "exec seq 1 5"]), &both(&logger.uri()))?;
    let (io, mut stdout, _stderr) = shim.streams("other")?;
    shim.start_exec("other", &bundle::process(&["seq", "1", "100000"]), &io)?;
    ensure!(stdout.read_to_end(DEADLINE)? == sequence(100_000, "\n").into_bytes());
    ensure!(shim.task.wait(&id, "e")? == 0);
    shim.task.delete(&id, "e")?;
    logger.wrote("terminated")?;
    ensure!(logger.processes(containerd.pid()) == 0);
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_slow_logging_program_has_all_output_when_its_container_is_deleted() -> Result<()> {
    let containerd = Containerd::shared()?;
    // runc's shim terminates the program at once, even if its pipe still contains output.
    let logger = Logger::new("cat <&3 >$dir/stdout 5>&- & exec 3<&- 4<&- 5>&-; wait; sleep 0.5; echo done >$dir/done")?;
    let container = containerd.detached(&["--log-uri", &logger.uri()], "slow-log", &["sh", "-c", "seq 1 100000"])?;
    container.await_status("STOPPED")?;
    container.delete_task()?;
    ensure!(fs::read_to_string(logger.path("done"))? == "done\n", "the container was deleted before its logger exited");
    ensure!(fs::read_to_string(logger.path("stdout"))? == sequence(100_000, "\n"));
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn no_logging_program_outlives_its_shim() -> Result<()> {
    let containerd = Containerd::shared()?;
    let logger = Logger::new("trap '' TERM; exec 5>&-; while :; do sleep 0.05; done")?;
    let container = containerd.detached(&["--log-uri", &logger.uri()], "outlive", &["sleep", "1000"])?;
    ensure!(logger.processes(containerd.pid()) > 0);
    containerd.shim_of(container.id())?.0.kill();
    wait_for(DEADLINE, "the logger is gone", || (logger.processes(containerd.pid()) == 0).then_some(()))?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn children_of_a_logging_program_are_killed_with_it() -> Result<()> {
    let containerd = Containerd::shared()?;
    // runc's shim kills only the program itself.
    let shim = Shim::idle(containerd, "with-children")?;
    let id = shim.bundle.id.clone();
    // The child runs the same script, so its command line identifies it. Both ignore SIGTERM.
    let script =
        "trap '' TERM; [ \"$1\" = child ] && { echo there >$dir/there; exec 5>&-; while :; do sleep 0.05; done; }
        $0 child & until [ -s $dir/there ]; do sleep 0.05; done; ";
    let cases = [("exec 5>&-; wait", true), ("wait", false)];
    for (index, (end, becomes_ready)) in cases.into_iter().enumerate() {
        let logger = Logger::new(&format!("{script}{end}"))?;
        let exec = format!("e{index}");
        shim.task.exec(&id, &exec, &bundle::process(&["true"]), &both(&logger.uri()))?;
        let started = shim.task.start(&id, &exec);
        ensure!(started.is_ok() == becomes_ready, "{started:?}");
        if becomes_ready {
            // At least two: forks that have not yet executed another program count as well.
            ensure!(logger.processes(containerd.pid()) >= 2);
            ensure!(shim.task.wait(&id, &exec)? == 0);
        }
        logger.wrote("there")?;
        shim.task.delete(&id, &exec)?;
        wait_for(DEADLINE, "the logger and its child are gone", || {
            (logger.processes(containerd.pid()) == 0).then_some(())
        })?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_fifo_given_as_a_file_does_not_wait_for_its_reader() -> Result<()> {
    let containerd = Containerd::shared()?;
    // With runc, Start waits for the reader.
    let shim = Shim::idle(containerd, "fifo-file")?;
    let id = shim.bundle.id.clone();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("fifo");
    husk_tests::fifo::make(&path)?;
    let io = Streams { stdout: format!("file://{}", path.display()), ..Streams::default() };
    shim.task.exec(&id, "e", &bundle::process(&["sh", "-c", "echo out; exec sleep 1000"]), &io)?;
    shim.task.start(&id, "e")?;
    let mut reader = husk_tests::fifo::Reader::open(&path)?;
    reader.read_until("out\n", DEADLINE)?;
    shim.task.kill(&id, "e", 9)?;
    ensure!(shim.task.wait(&id, "e")? == 137);
    ensure!(reader.read_to_end(DEADLINE)?.is_empty());
    Ok(())
}

#[test]
fn a_path_that_is_no_fifo_is_written_as_a_file() -> Result<()> {
    let containerd = Containerd::shared()?;
    let shim = Shim::idle(containerd, "plain")?;
    let id = shim.bundle.id.clone();
    let folder = tempfile::tempdir()?;
    let plain = folder.path().join("plain");
    fs::write(&plain, "")?;
    let address = |path: &Path| path.display().to_string();
    let io = Streams { stdout: address(&plain), stderr: "/dev/null".into(), ..Streams::default() };
    shim.task.exec(&id, "e", &bundle::process(&["sh", "-c", "echo out; echo err >&2"]), &io)?;
    shim.task.start(&id, "e")?;
    ensure!(shim.task.wait(&id, "e")? == 0);
    shim.task.delete(&id, "e")?;
    ensure!(fs::read_to_string(&plain)? == "out\n");
    Ok(())
}
