//! The metadata service of the host, as what runs in a VM finds it: who the VM is, with a proof for others, and its workspace.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use husk_protos::metadata::GetMetadataResponse;
use husk_protos::protobuf::Message;
use husk_protos::ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader, Request, Response};
use husk_protos::{HOST_CID, PORT_METADATA};
use husk_tests::agent::{Agent, question};
use husk_tests::artifacts::{Runtime, built};
use husk_tests::containerd::{Configured, Containerd, NAMESPACE};
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

/// In each workspace of these tests, and nowhere else.
const SECRET: &str = "hunter2";

/// Where the configuration of these tests has everything, for a containerd of its own.
struct Host {
    configured: Configured,
    folder: tempfile::TempDir,
    config: std::path::PathBuf,
    probe: String,
}

impl Host {
    fn start() -> Result<Self> {
        Self::start_with("")
    }

    /// With more configuration.
    fn start_with(more: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir(at("workspaces"))?;
        let text = format!(
            "metadata_key = {:?}\nworkspace_dir = {:?}\ntoken_lifetime_ms = 90000\nlog_level = \"debug\"\n{more}",
            at("etc/metadata.key"),
            at("workspaces")
        );
        let config = folder.path().join("config.toml");
        fs::write(&config, &text)?;
        let probe = guest_program("probe")?;
        let probe = format!("type=bind,src={},dst=/probe,options=rbind:ro", probe.display());
        Ok(Self { configured: Configured::start(&text)?, folder, config, probe })
    }

    fn containerd(&self) -> &Containerd {
        &self.configured.containerd
    }

    /// Flags of a container that has vsock and the probe, and this workspace.
    fn flags<'a>(&'a self, workspace: &'a str) -> Vec<&'a str> {
        let mut flags = vec!["--mount", &self.probe, "--annotation", "io.husk.vsock=true"];
        // Little, because a test looks through it.
        flags.extend(["--annotation", "io.husk.memory_mib=128"]);
        if !workspace.is_empty() {
            flags.extend(["--annotation", workspace]);
        }
        flags
    }

    /// `husk metadata public-key`, in this form.
    fn public_key(&self, form: &[&str]) -> Result<String> {
        let mut command = Command::new(built("husk")?);
        let output = command.args(["metadata", "public-key"]).args(form).env("HUSK_CONFIG", &self.config).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Has openssl verify a token by the printed public key, and gives its claims.
    fn claims(&self, token: &str) -> Result<Value> {
        let parts: Vec<&str> = token.split('.').collect();
        let [header, claims, signature] = parts[..] else { anyhow::bail!("{token}: not three parts") };
        let at = |name: &str| self.folder.path().join(name);
        fs::write(at("public.pem"), self.public_key(&[])?)?;
        fs::write(at("signed"), format!("{header}.{claims}"))?;
        fs::write(at("signature"), base64url(signature)?)?;
        let mut openssl = Command::new("openssl");
        openssl.args(["pkeyutl", "-verify", "-pubin", "-rawin", "-inkey"]).arg(at("public.pem"));
        let verified = openssl.arg("-in").arg(at("signed")).arg("-sigfile").arg(at("signature")).output()?;
        ensure!(verified.status.success(), "{token}: {}", String::from_utf8_lossy(&verified.stderr));
        let header: Value = serde_json::from_slice(&base64url(header)?)?;
        let jwk: Value = serde_json::from_str(&self.public_key(&["--json"])?)?;
        ensure!(header == json!({"alg": "EdDSA", "typ": "JWT", "kid": jwk["kid"]}), "{header}");
        Ok(serde_json::from_slice(&base64url(claims)?)?)
    }
}

fn base64url(text: &str) -> Result<Vec<u8>> {
    let mut bits = 0_u32;
    let (mut held, mut bytes) = (0, Vec::new());
    for letter in text.bytes() {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let value = alphabet.iter().position(|known| *known == letter).context("not base64url")?;
        (bits, held) = (bits << 6 | value as u32, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    Ok(bytes)
}

/// The command line of a Get by the probe, which says in each place that there is that it is somebody else.
fn ask() -> Result<String> {
    // Fields that GetMetadataRequest has not: "somebody" and "else".
    let payload = b"\x0a\x08somebody\x12\x04else".to_vec();
    let request = Request { service: "husk.v1.Metadata".into(), method: "Get".into(), payload, ..Default::default() };
    let bytes = request.write_to_bytes()?;
    let frame = [Vec::from(MessageHeader::new_request(1, bytes.len() as u32)), bytes].concat();
    Ok(format!("/probe ask {HOST_CID} {PORT_METADATA} {}", hex(&frame)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(text: &str) -> Result<GetMetadataResponse> {
    let digits = |at| u8::from_str_radix(text.get(at..at + 2).unwrap_or("none"), 16);
    let bytes =
        (0..text.len()).step_by(2).map(digits).collect::<Result<Vec<u8>, _>>().with_context(|| text.to_owned())?;
    let header = MessageHeader::from(bytes.get(..MESSAGE_HEADER_LENGTH).context("no answer")?);
    let body = bytes.get(MESSAGE_HEADER_LENGTH..).context("no answer")?;
    ensure!(header.length as usize == body.len(), "{} bytes of {}", body.len(), header.length);
    let response = Response::parse_from_bytes(body)?;
    ensure!(response.status.is_none(), "{:?}", response.status);
    Ok(GetMetadataResponse::parse_from_bytes(&response.payload)?)
}

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

#[test]
fn a_vm_proves_who_it_is_and_gets_its_workspace_and_no_others() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_vm_proves_who_it_is_and_gets_its_workspace_and_no_others") {
        return Ok(());
    }
    let host = Host::start()?;
    let file = host.folder.path().join("workspaces/project");
    // Not JSON, and as large as it may be.
    let content = [SECRET.as_bytes(), &vec![0xfe; 256 * 1024 - SECRET.len()]].concat();
    fs::write(&file, &content)?;
    let inline = format!(r#"{{"password": "{SECRET}"}}"#);
    let table = [
        (String::new(), None),
        (format!("io.husk.workspace={inline}"), Some(inline.as_bytes())),
        (format!("io.husk.workspace={}", file.display()), Some(&content[..])),
    ];
    ensure!(!host.folder.path().join("etc/metadata.key").exists(), "the key is there before its first use");
    let containers = table
        .iter()
        .map(|(workspace, _)| host.containerd().detached(&host.flags(workspace), "metadata", &["sleep", "1000"]))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!host.folder.path().join("etc/metadata.key").exists(), "the key is made for VMs that do not ask");
    for (container, (workspace, expected)) in containers.iter().zip(&table) {
        let began = now()?;
        let answer = answer(&container.script(&ask()?)?)?;
        ensure!(
            answer.workspace.as_deref() == *expected,
            "{workspace}: {:?}",
            answer.workspace.map(|bytes| bytes.len())
        );
        let claims = host.claims(&answer.token)?;
        let issued = claims["iat"].as_u64().context("no time of issue")?;
        ensure!((began..=now()?).contains(&issued), "{claims}");
        let expected = json!({"iss": "husk", "sandbox": container.id(), "namespace": NAMESPACE, "cid": 3,
            "iat": issued, "exp": issued + 90});
        ensure!(claims == expected, "{claims}, not {expected}");
    }
    // What husk wrote, said, and told the guest: nothing of it has the workspace.
    let containerd = host.containerd();
    for (container, (workspace, _)) in containers.iter().zip(&table) {
        let state = containerd.sh(&format!(
            "cat /run/husk/{NAMESPACE}/{}/*.json /run/husk/{NAMESPACE}/{}/*.log",
            container.id(),
            container.id()
        ))?;
        ensure!(state.text().contains(container.id()) && !state.text().contains(SECRET), "{}", state.text());
        let inside = container.script("cat /proc/cmdline; dmesg")?;
        ensure!(inside.contains("husk.log=debug") && !inside.contains(SECRET), "{inside}");
        let (shim, below) = containerd.shim_of(container.id())?;
        let qemu = below.iter().find(|process| process.name.starts_with("qemu")).context("no QEMU")?;
        for process in [&shim, qemu] {
            ensure!(!process.command.contains(SECRET), "{}", process.command);
        }
        if !workspace.contains(SECRET) {
            continue;
        }
        // The one annotation travels with the spec, the other does not.
        ensure!(memory_has(qemu.pid, "io.husk.vsock")?, "the guest's memory was not looked through");
        ensure!(!memory_has(qemu.pid, "io.husk.workspace")?, "the guest's memory has the annotation");
    }
    ensure!(containerd.logged(SECRET).is_empty(), "{:?}", containerd.logged(SECRET));
    Ok(())
}

/// Whether some writable page of a process has this text in it: for a QEMU, also the guest's memory.
fn memory_has(pid: i32, text: &str) -> Result<bool> {
    use std::io::{Read, Seek, SeekFrom};
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut memory = fs::File::open(Path::new("/proc").join(pid.to_string()).join("mem"))?;
    for line in maps.lines().filter(|line| line.contains("memfd:")) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-')).context("a line of maps")?;
        let (from, to) = (u64::from_str_radix(range.0, 16)?, u64::from_str_radix(range.1, 16)?);
        memory.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        Read::by_ref(&mut memory).take(to - from).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == to - from, "{} bytes of {line}", bytes.len());
        // SAFETY: both are slices of these lengths, and memmem(3) reads nothing else. In Rust it would take minutes without an optimiser.
        let found = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), text.as_ptr().cast(), text.len()) };
        if !found.is_null() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn containers_of_a_pod_are_one_vm_whose_workspace_is_that_of_the_one_that_it_was_booted_for() -> Result<()> {
    let name = "containers_of_a_pod_are_one_vm_whose_workspace_is_that_of_the_one_that_it_was_booted_for";
    if !Runtime::under_test().is_husk_or_tell(name) {
        return Ok(());
    }
    let host = Host::start()?;
    let pod = host.containerd().id("pod");
    let of_pod = format!("io.kubernetes.cri.sandbox-id={pod}");
    let [first, second] = [r#"io.husk.workspace={"first": 1}"#, r#"io.husk.workspace={"second": 2}"#];
    let start = |workspace| {
        let flags = [&host.flags(workspace)[..], &["--annotation", &of_pod]].concat();
        host.containerd().detached(&flags, "member", &["sleep", "1000"])
    };
    for container in [start(first)?, start(second)?] {
        let answer = answer(&container.script(&ask()?)?)?;
        ensure!(answer.workspace.as_deref() == Some(br#"{"first": 1}"#), "{:?}", answer.workspace);
        let claims = host.claims(&answer.token)?;
        ensure!(claims["sandbox"] == json!(pod), "{claims}");
    }
    Ok(())
}

#[test]
fn the_supervisor_agent_reaches_it_beside_containers_that_do_not() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("the_supervisor_agent_reaches_it_beside_containers_that_do_not") {
        return Ok(());
    }
    let host = Host::start_with("allowed_annotations = [\"io.husk.extras.files\", \"io.husk.workspace\"]\n")?;
    let mut agent = Agent::new("serve")?;
    agent.bring("/probe", &fs::read(guest_program("probe")?)?, 0o755)?;
    let flags = agent.flags();
    let flags = ["--net-host", "--mount", &host.probe, "--annotation", "io.husk.workspace={}", &flags[0], &flags[1]];
    let container = host.containerd().detached(&flags, "supervised", &["sleep", "1000"])?;
    let refused = container.script(&format!("{} || echo $?", ask()?))?;
    ensure!(refused.starts_with("refused: ") && refused.ends_with("\n1"), "{refused}");
    // The container asks the agent, and that the host.
    let told = container.script(&question(&format!("run {}", ask()?)))?;
    let answer = answer(&told)?;
    ensure!(answer.workspace.as_deref() == Some(b"{}".as_slice()), "{told}");
    ensure!(host.claims(&answer.token)?["sandbox"] == container.id(), "{told}");
    Ok(())
}

#[test]
fn a_container_that_was_not_given_vsock_does_not_reach_it() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_container_that_was_not_given_vsock_does_not_reach_it") {
        return Ok(());
    }
    let host = Host::start()?;
    let script = format!("{} || echo $?", ask()?);
    for more in [&[][..], &["--privileged"], &["--annotation", "io.husk.vsock=false"]] {
        let flags = [&["--mount", &host.probe, "--annotation", "io.husk.workspace={}"], more].concat();
        let seen = host.containerd().script(&flags, "metadata", &script)?;
        ensure!(seen.starts_with("refused: ") && seen.ends_with("\n1"), "{more:?}: {seen}");
    }
    ensure!(!host.folder.path().join("etc/metadata.key").exists(), "somebody has asked");
    Ok(())
}

#[test]
fn a_workspace_that_is_not_allowed_is_refused_at_create_and_not_told() -> Result<()> {
    if !Runtime::under_test().is_husk_or_tell("a_workspace_that_is_not_allowed_is_refused_at_create_and_not_told") {
        return Ok(());
    }
    let host = Host::start()?;
    let outside = host.folder.path().join("config.toml").display().to_string();
    let large = format!("\"{SECRET}{}\"", "x".repeat(100_000));
    let table = [
        (format!("{{\"password\": {SECRET}}}"), "annotation io.husk.workspace = (21 bytes): must be JSON"),
        (outside.clone(), &format!("annotation io.husk.workspace = {outside:?}: not a file under workspace_dir, ")),
        (format!("{large} x"), "annotation io.husk.workspace = (100011 bytes): must be JSON"),
    ];
    for (workspace, expected) in table {
        let annotation = format!("io.husk.workspace={workspace}");
        let id = host.containerd().id("refused");
        let refused = host.containerd().run(&["--annotation", &annotation], &id, &["true"]).output()?;
        let errors = refused.errors();
        ensure!(refused.code() != 0 && errors.contains(expected) && !errors.contains(SECRET), "{expected}: {errors}");
    }
    ensure!(host.containerd().logged(SECRET).is_empty(), "{:?}", host.containerd().logged(SECRET));
    Ok(())
}
