//! The supervisor agent and the other extras: they are in the guest as the annotation requests before anything else
//! runs. The agent is restarted when it exits, up to a limit, and stopped with its guest. The restart policy itself is
//! tested as a table next to its code.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_protos::frame;
use husk_protos::report::report::What;
use husk_protos::report::supervisor_status::State;
use husk_protos::report::{LogLevel, LogLine, Report, SupervisorStatus};
use husk_tests::agent::{Agent, PARAMETERS, request};
use husk_tests::bundle;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Containerd};
use husk_tests::guest::{Guest, STEP, config, spec};
use husk_tests::shim::{Shim, Streams};
use husk_tests::vm::{Disk, MachineType, Vm, VmConfig};
use serde_json::{Value, json};
use tokio::time::timeout;

/// The configuration of an operator who allows users to add host files.
const ALLOWED: &str =
    "allowed_annotations = [\"io.husk.extras.files\", \"io.husk.supervisor\", \"io.husk.vcpus\"]\nmemory_mib = 256\n";

/// The value of a line `name=value`.
fn value<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.with_context(|| format!("no {name} in {text:?}"))
}

fn strs(strings: &[String]) -> Vec<&str> {
    strings.iter().map(String::as_str).collect()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_agent_runs_beside_the_containers_and_inherits_nothing_from_pid_1() -> Result<()> {
    let configured = Configured::start(ALLOWED)?;
    let containerd = &configured.containerd;
    let mut agent = Agent::new("serve")?;
    let content: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    agent.add("/opt/a/b/data", &content, 0o640)?;
    agent.add("/tmp/empty", b"", 0o0)?;
    agent.add("/opt/tool", &std::fs::read(husk_tests::agent::program()?)?, 0o755)?;
    let flags = [&agent.flags()[..], &["--net-host".to_owned()]].concat();
    let container = containerd.detached(&strs(&flags), "beside", &["sleep", "1000"])?;

    let about = container.script(&request("about"))?;
    eprintln!("{about}");
    let pid = value(&about, "pid")?;
    let expected = [
        ("pid_file", pid),
        ("cgroup", "0::/supervisor"),
        ("memory_min", "33554432"),
        ("oom_score_adj", "-999"),
        ("personality", "00000000"),
        ("blocked", "0000000000000000 ignored=0000000000001000"),
        ("open_files", "1024"),
        ("session", pid),
        ("fds", "6"),
        ("args", "[\"/run/husk/supervisor\"]"),
        ("stdin", "/dev/null"),
    ];
    for (name, expected) in expected {
        ensure!(value(&about, name)? == expected, "{name} is not {expected:?}: {about}");
    }
    ensure!(value(&about, "env")?.starts_with("[(\"PATH\", "), "{about}");

    let sum = content
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let table = [
        ("show /opt/a/b/data", format!("640 {} {sum}", content.len())),
        ("show /tmp/empty", format!("0 0 {}", 0xcbf2_9ce4_8422_2325_u64)),
        ("run /opt/tool hello", "hello".to_owned()),
    ];
    for (line, expected) in table {
        let response = container.script(&request(line))?;
        ensure!(response == expected, "{line}: {response:?}, expected {expected:?}");
    }
    // The annotation says 0600; husk makes the agent executable.
    ensure!(container.script(&request("show /run/husk/supervisor"))?.starts_with("755 "));

    // An agent that exits on SIGTERM does not delay the VM's end.
    container.kill_and_wait()?;
    let (shim, _) = containerd.shim_of(container.id())?;
    let started = Instant::now();
    container.delete_task()?;
    wait_for(STEP, "the shim exits", || (!shim.is_alive()).then_some(()))?;
    eprintln!("gone after {:?}", started.elapsed());
    ensure!(containerd.logged("did not exit on SIGTERM").is_empty(), "{}", containerd.log_tail());
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_agent_runs_only_if_present_and_not_disabled() -> Result<()> {
    let configured = Configured::start(ALLOWED)?;
    let containerd = &configured.containerd;
    let script = "grep -o 'husk.[es][xu][^ ]*' /proc/cmdline | tr '\\n' ' '; echo about | nc 127.0.0.1 7007 2>&1 | grep -c ^pid || true";
    // Without an agent, nothing of it appears.
    ensure!(containerd.script(&["--net-host"], "no-agent", script)? == "0");
    ensure!(containerd.logged("supervisor").is_empty(), "{}", containerd.log_tail());
    let agent = Agent::new("serve")?;
    let disabled = "io.husk.supervisor=false".to_owned();
    let flags = [&agent.flags()[..], &["--annotation".to_owned(), disabled, "--net-host".to_owned()]].concat();
    ensure!(containerd.script(&strs(&flags), "disabled", script)? == "husk.extras=husk-extras 0");
    ensure!(containerd.logged("supervisor agent").is_empty(), "{}", containerd.log_tail());
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn invalid_extras_are_rejected_by_field_and_value() -> Result<()> {
    let configured = Configured::start(&format!("{ALLOWED}extras_max_mib = 1\n"))?;
    let create_error = |containerd: &Containerd, annotations: &[String]| -> Result<String> {
        let flags: Vec<&str> = annotations.iter().flat_map(|annotation| ["--annotation", annotation]).collect();
        let ran = containerd.run(&flags, &containerd.id("refused"), &["true"]).output()?;
        ensure!(ran.code() != 0, "{annotations:?}: {ran}");
        Ok(ran.errors())
    };
    let extras = |json: Value| format!("io.husk.extras.files={json}");
    let mut large = Agent::new("serve")?;
    large.add("/opt/large", &vec![0; 1 << 20], 0o644)?;
    let invalid = json!({
        "/proc/x": {"source": "/etc/passwd", "mode": "0644"},
        "/a/../b": {"source": "/etc/passwd", "mode": "0644"},
        "/c": {"source": "/etc", "mode": "9"},
    });
    let missing = json!({"/d": {"source": "/no/such/file", "mode": "0644"}, "/e": {"source": "/etc", "mode": "0644"}});
    let table: [(&[String], &[&str]); 5] = [
        (
            &["io.husk.supervisor=true".to_owned()],
            &["annotation io.husk.supervisor = \"true\": there is no agent", "/run/husk/supervisor"],
        ),
        (
            &[extras(invalid), "io.husk.vcpus=0".to_owned()],
            &[
                "[\"/proc/x\"] = {",
                "outside of /proc",
                "[\"/a/../b\"] = {",
                "must be clean",
                "[\"/c\"].mode = \"9\"",
                "vCPU count must be greater than zero",
            ],
        ),
        (
            &[extras(missing)],
            &["[\"/d\"].source = \"/no/such/file\": No such file", "[\"/e\"].source = \"/etc\": not a regular file"],
        ),
        (&[format!("io.husk.extras.files={}", large.annotation())], &["bytes: more than extras_max_mib = 1"]),
        (&["io.husk.extras.files={".to_owned()], &["annotation io.husk.extras.files = \"{\": must be a JSON object"]),
    ];
    for (annotations, expected) in table {
        let errors = create_error(&configured.containerd, annotations)?;
        // ctr quotes the message once more.
        let errors = errors.replace("\\\"", "\"");
        let missing: Vec<_> = expected.iter().filter(|part| !errors.contains(**part)).collect();
        ensure!(missing.is_empty(), "{annotations:?}: no {missing:?} in {errors}");
    }
    // By default, users who start containers cannot read host files as root.
    let by_default =
        create_error(Containerd::shared()?, &[extras(json!({"/x": {"source": "/etc/passwd", "mode": "0644"}}))])?;
    ensure!(by_default.contains("not among the allowed_annotations of husk's configuration"), "{by_default}");
    ensure!(by_default.contains("/etc/husk/config.toml"), "{by_default}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_later_container_cannot_request_extras_that_its_vm_lacks() -> Result<()> {
    let configured = Configured::start(ALLOWED)?;
    let containerd = &configured.containerd;
    let (agent, other) = (Agent::new("serve")?, Agent::new("serve")?);
    let pod = containerd.id("pod");
    let spec = |id: &str, annotations: Value| {
        let mut spec = bundle::spec(id, &["sleep", "1000"]);
        spec["annotations"] = annotations;
        spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!(pod);
        spec
    };
    let _first = Shim::running(containerd, &pod, &spec(&pod, json!({"io.husk.extras.files": agent.annotation()})))?;
    let table = [
        ("nothing", json!({}), None),
        ("same", json!({"io.husk.extras.files": agent.annotation(), "io.husk.supervisor": "true"}), None),
        ("other", json!({"io.husk.extras.files": other.annotation()}), Some("was booted without it")),
        ("unwanted", json!({"io.husk.supervisor": "false"}), Some("was booted with a supervisor agent")),
    ];
    for (name, annotations, expected) in table {
        let id = containerd.id(name);
        let shim = Shim::start(containerd, &id, &spec(&id, annotations))?;
        match (shim.create(&Streams::default()), expected) {
            (Ok(_), None) => {}
            (Err(error), Some(expected)) => ensure!(format!("{error:#}").contains(expected), "{name}: {error:#}"),
            (created, expected) => bail!("{name}: {created:?}, expected {expected:?}"),
        }
    }
    Ok(())
}

/// Boots a guest with this agent.
async fn boot(agent: &Agent, config: VmConfig) -> Result<Guest> {
    let kernel_parameters = format!("{PARAMETERS} {}", config.kernel_parameters);
    Guest::boot_with(VmConfig { disks: vec![agent.disk()?], kernel_parameters, ..config }).await
}

/// Receives reports until the agent's state is `state`. Returns the log lines and the agent's status.
async fn reports_until(guest: &mut Guest, state: State) -> Result<(Vec<LogLine>, SupervisorStatus)> {
    let mut lines = Vec::new();
    loop {
        let report: Report =
            timeout(STEP, frame::read(&mut guest.ready)).await.context("the guest sends no reports")??;
        match report.what {
            Some(What::Log(line)) => lines.push(line),
            Some(What::Supervisor(status)) if status.state.enum_value_or_default() == state => {
                return Ok((lines, status));
            }
            _ => {}
        }
    }
}

/// The next reported log line of level error.
async fn next_error(guest: &mut Guest) -> Result<String> {
    loop {
        let report: Report = frame::read(&mut guest.ready).await?;
        match report.what {
            Some(What::Log(line)) if line.level == LogLevel::LOG_LEVEL_ERROR.into() => return Ok(line.message),
            _ => {}
        }
    }
}

/// A container that sees the guest's logs and processes, and shares its network.
fn insider(script: &str) -> Value {
    let mut spec = spec(&["sh", "-c", script]);
    let bind =
        |path: &str, to: &str| json!({"destination": to, "type": "bind", "source": path, "options": ["bind", "ro"]});
    bundle::append(&mut spec, "/mounts", [bind("/var/log", "/tmp/log"), bind("/run", "/tmp/run")]);
    spec["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    spec
}

/// The request `about`, for a container whose `nc` is an applet of busybox only.
fn about_request() -> String {
    request("about").replace("nc", "busybox nc")
}

fn field<'a>(line: &'a LogLine, name: &str) -> Option<&'a str> {
    line.fields.iter().find(|field| field.name == name).map(|field| field.value.as_str())
}

#[tokio::test]
async fn a_crashing_agent_is_restarted_with_backoff_up_to_a_limit() -> Result<()> {
    // With an instruction clock, guest minutes take seconds, and times are exact.
    let counted = VmConfig { instruction_clock: true, ..config()? };
    let mut guest = boot(&Agent::new("crash")?, counted).await?;
    let (lines, status) = reports_until(&mut guest, State::GAVE_UP).await?;
    ensure!((status.restarts, status.pid) == (10, 0) && status.last_end == "exited with status 3", "{status}");
    let waits: Vec<u64> = lines.iter().filter_map(|line| field(line, "wait_ms")?.parse().ok()).collect();
    ensure!(waits == [1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 30000, 30000], "{waits:?}");

    let script =
        "cat /tmp/log/husk-supervisor.log; ls /tmp/run; cat /sys/fs/cgroup/cgroup.controllers >/dev/null; true";
    let (code, out) = guest.run("inside", &insider(script)).await?;
    ensure!(code == 0 && !out.contains("husk-supervisor.pid"), "{out}");
    let started: Vec<u64> = out.lines().filter_map(|line| line.split_once("at_ms=")?.1.parse().ok()).collect();
    ensure!(started.len() == 11, "{out}");
    for (pair, wait) in started.windows(2).zip(&waits) {
        let took = pair[1] - pair[0];
        ensure!((*wait..wait + 1000).contains(&took), "{took} ms where {wait} were due: {started:?}");
    }
    let error = LogLevel::LOG_LEVEL_ERROR.into();
    let message = match lines.iter().find(|line| line.level == error) {
        Some(line) => line.message.clone(),
        // The guest reports the state before queued log lines.
        None => timeout(STEP, next_error(&mut guest)).await.context("no error is reported")??,
    };
    let expected = "the supervisor agent exited with status 3; giving up after 10 restarts within 300 s";
    ensure!(message == expected, "{message}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_agent_that_cannot_be_executed_counts_as_crashing() -> Result<()> {
    let counted = VmConfig { instruction_clock: true, ..config()? };
    let mut agent = Agent::new("serve")?;
    agent.replace(b"no program\n")?;
    let mut guest = boot(&agent, counted).await?;
    let (_, status) = reports_until(&mut guest, State::GAVE_UP).await?;
    let expected = "failed to start: exec: \"/run/husk/supervisor\": exec format error";
    ensure!(status.restarts == 10 && status.last_end == expected, "{status}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_agent_that_ignores_sigterm_is_killed_after_five_seconds_with_its_children() -> Result<()> {
    let mut guest = boot(&Agent::new("ignore-term")?, config()?).await?;
    reports_until(&mut guest, State::RUNNING).await?;
    ensure!(guest.run("inside", &insider(&about_request())).await?.0 == 0);
    // After an unexpected exit too, its children are killed and do not accumulate.
    let child = "child=$(busybox sed -n '1,2s/^child=//p' /tmp/log/husk-supervisor.log)";
    let script = format!("{child}; [ -e /proc/$child ] && kill -KILL $(cat /tmp/run/husk-supervisor.pid)");
    ensure!(guest.run("kills", &insider(&script)).await?.0 == 0);
    let (_, status) = reports_until(&mut guest, State::RUNNING).await?;
    ensure!(status.restarts == 1 && status.last_end == "exited with status 137", "{status}");
    let (code, out) = guest.run("check", &insider(&format!("{child}; echo $child; [ ! -e /proc/$child ]"))).await?;
    ensure!(code == 0 && out.trim().parse::<u32>().is_ok(), "{code} {out:?}");
    // A response shows that the second agent ignores SIGTERM by now.
    ensure!(guest.run("again", &insider(&about_request())).await?.0 == 0);

    let started = Instant::now();
    let task = guest.task.clone();
    let shutdown = tokio::spawn(async move {
        let result = task.shutdown(husk_tests::guest::call(), &Default::default()).await;
        (result.map(drop), started.elapsed())
    });
    let (lines, status) = reports_until(&mut guest, State::STOPPED).await?;
    ensure!(status.last_end == "exited with status 137", "{status}");
    ensure!(lines.iter().any(|line| line.message.contains("did not exit on SIGTERM")), "{lines:?}");
    let (result, took) = shutdown.await?;
    ensure!(result.is_ok() && took >= Duration::from_secs(5), "{result:?} after {took:?}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_whose_agent_ignores_sigterm_is_not_killed() -> Result<()> {
    // A call timeout shorter than the agent's grace period.
    let configured = Configured::start(&format!("{ALLOWED}call_timeout_ms = 4000\n"))?;
    let containerd = &configured.containerd;
    let container =
        containerd.detached(&strs(&Agent::new("ignore-term")?.flags()), "ignore-term", &["sleep", "1000"])?;
    container.kill_and_wait()?;
    let (shim, below) = containerd.shim_of(container.id())?;
    container.delete_task()?;
    wait_for(STEP, "the shim exits", || (!shim.is_alive()).then_some(()))?;
    ensure!(below.iter().all(|process| !process.is_alive()), "{below:#?}");
    containerd.await_logged("to=Stopped", 1)?;
    ensure!(
        containerd.logged("is killed").iter().all(|line| !line.contains("the VM did not end")),
        "{}",
        containerd.log_tail()
    );
    Ok(())
}

#[tokio::test]
async fn a_container_that_eats_all_memory_does_not_kill_the_agent_or_pid_1() -> Result<()> {
    let mut guest = boot(&Agent::new("serve")?, VmConfig { memory: 256, ..config()? }).await?;
    let (_, status) = reports_until(&mut guest, State::RUNNING).await?;
    // With the strongest protection that the kubelet gives to a container.
    let mut eater = spec(&["busybox", "tail", "/dev/zero"]);
    eater["process"]["oomScoreAdj"] = json!(-997);
    let (code, out) = guest.run("eater", &eater).await?;
    ensure!(code == 137, "{code} {out}");
    let (code, about) = guest.run("inside", &insider(&about_request())).await?;
    ensure!(code == 0 && value(&about, "pid")? == status.pid.to_string(), "{code} {about}, expected {status}");
    guest.info().await?;
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_agents_output_is_kept_in_two_files_of_limited_size() -> Result<()> {
    let mut guest = boot(&Agent::new("flood")?, config()?).await?;
    reports_until(&mut guest, State::RUNNING).await?;
    let script = format!(
        "({}) >/dev/null && cd /tmp/log && ls && busybox stat -c %s husk-supervisor.log.1 husk-supervisor.log && busybox head -n 1 \
         husk-supervisor.log.1 && busybox tail -n 1 husk-supervisor.log.1 && busybox head -n 1 husk-supervisor.log && busybox tail -n 1 husk-supervisor.log",
        about_request()
    );
    let (code, out) = guest.run("inside", &insider(&script)).await?;
    let lines: Vec<&str> = out.lines().collect();
    ensure!(
        code == 0 && lines.len() == 8 && lines[..2] == ["husk-supervisor.log", "husk-supervisor.log.1"],
        "{code} {out}"
    );
    let number = |line: &str| line.split(' ').next().and_then(|number| number.parse::<u64>().ok()).context("a number");
    let (before, now) = (number(lines[2])?, number(lines[3])?);
    // Lines of 66 bytes: the file is rotated when the next line does not fit.
    ensure!((1048576 - 66..=1048576).contains(&before) && now <= 1048576, "{before} {now}");
    let [first, last, next, end] = [number(lines[4])?, number(lines[5])?, number(lines[6])?, number(lines[7])?];
    ensure!(next == last + 1 && end == 39_999 && before == (last - first + 1) * 66, "{lines:?}");
    guest.shut_down().await?;
    Ok(())
}

#[tokio::test]
async fn an_agents_output_is_also_on_the_console_in_debug_mode() -> Result<()> {
    for debug in [false, true] {
        let kernel_parameters = format!("husk.debug={}", u8::from(debug));
        let mut guest = boot(&Agent::new("serve")?, VmConfig { kernel_parameters, ..config()? }).await?;
        reports_until(&mut guest, State::RUNNING).await?;
        // The agent prints before it listens, so a response shows that its output is recorded.
        ensure!(guest.run("inside", &insider(&about_request())).await?.0 == 0);
        let console = guest.shut_down().await?;
        ensure!(console.contains("started pid=") == debug, "debug {debug}: {console}");
    }
    Ok(())
}

#[tokio::test]
async fn the_extras_disk_is_found_by_serial_in_any_position() -> Result<()> {
    let agent = Agent::new("serve")?;
    let decoy = |serial: &str| Disk { serial: serial.into(), content: vec![0; 4096] };
    for machine in [MachineType::Microvm, MachineType::Q35] {
        for place in [0, 2] {
            let mut disks = vec![decoy("decoy"), decoy("husk-extra")];
            disks.insert(place, agent.disk()?);
            let config = VmConfig { machine, disks, kernel_parameters: PARAMETERS.into(), ..config()? };
            let mut guest = Guest::boot_with(config).await?;
            reports_until(&mut guest, State::RUNNING).await.with_context(|| format!("{machine:?} {place}"))?;
            guest.shut_down().await?;
        }
    }
    Ok(())
}

/// The console of a guest that fails to boot.
fn failed_boot(config: &VmConfig) -> Result<String> {
    let (_device, qemus_end) = husk_vsock::Device::start(3)?;
    let mut vm = Vm::boot_with(config, qemus_end)?;
    vm.wait(STEP)?;
    Ok(vm.console())
}

#[tokio::test]
async fn a_guest_with_missing_or_invalid_extras_reports_the_error_and_ends() -> Result<()> {
    let decoy = Disk { serial: "decoy".into(), content: vec![0; 4096] };
    let mut impossible = Agent::new("serve")?;
    impossible.add("/dev/pts/x", b"x", 0o644)?;
    let mut file_as_folder = Agent::new("serve")?;
    file_as_folder.add("/init/x", b"x", 0o644)?;
    let table = [
        (
            vec![decoy.clone()],
            "husk.extras=no-such-disk",
            "unpack the extras: no block device with serial \"no-such-disk\" within 5 s; present: vda (\"decoy\")",
        ),
        (vec![], "husk.extras=no-such-disk", "with serial \"no-such-disk\" within 5 s; there are none"),
        (vec![decoy], "husk.extras=decoy", "unpack the extras: not an extras disk"),
        (
            vec![impossible.disk()?],
            PARAMETERS,
            "unpack the extras: write /dev/pts/x: its file system does not allow executables (noexec)",
        ),
        (vec![file_as_folder.disk()?], PARAMETERS, "unpack the extras: write /init/x: "),
        (vec![], "husk.supervisor=1", "husk.supervisor=1 requires /run/husk/supervisor: No such file"),
    ];
    for (disks, parameters, expected) in table {
        let started = Instant::now();
        let console = failed_boot(&VmConfig { disks, kernel_parameters: parameters.into(), ..config()? })?;
        ensure!(
            console.contains(&format!("husk: fatal: {expected}")) || console.contains(expected),
            "{parameters}: {console}"
        );
        eprintln!("{parameters}: {:?}", started.elapsed());
        ensure!(
            !expected.contains("within 5 s") || started.elapsed() >= Duration::from_secs(5),
            "{:?}",
            started.elapsed()
        );
    }
    Ok(())
}
