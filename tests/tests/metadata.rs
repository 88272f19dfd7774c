//! The host's metadata service, from inside a VM: the VM's identity, with a token that others can verify, and its
//! workspace.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use husk_protos::metadata::GetMetadataResponse;
use husk_protos::protobuf::Message;
use husk_protos::ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader, Request, Response};
use husk_protos::{HOST_CID, PORT_METADATA};
use husk_tests::agent::{Agent, request};
use husk_tests::artifacts::built;
use husk_tests::containerd::{Configured, Containerd, NAMESPACE};
use husk_tests::vm::guest_program;
use serde_json::{Value, json};

/// Part of every workspace of these tests, and of nothing else.
const SECRET: &str = "hunter2";

/// A containerd whose configuration has all files in a temporary directory.
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

    /// Like [`Self::start`], with additional configuration.
    fn start_with(more: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir_all(at(&format!("workspaces/{NAMESPACE}")))?;
        let text = format!(
            "metadata_key = {:?}\nworkspace_dir = {:?}\ntoken_lifetime_ms = 90000\ntoken_host = \"node-7\"\nlog_level = \"debug\"\n{more}",
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

    /// Flags of a container with vsock, the probe and this workspace.
    fn flags<'a>(&'a self, workspace: &'a str) -> Vec<&'a str> {
        let mut flags = vec!["--mount", &self.probe, "--annotation", "io.husk.vsock=true"];
        // Little memory, because a test searches it.
        flags.extend(["--annotation", "io.husk.memory_mib=128"]);
        if !workspace.is_empty() {
            flags.extend(["--annotation", workspace]);
        }
        flags
    }

    /// The output of `husk metadata public-key` in this format.
    fn public_key(&self, format: &[&str]) -> Result<String> {
        let mut command = Command::new(built("husk")?);
        let output = command.args(["metadata", "public-key"]).args(format).env("HUSK_CONFIG", &self.config).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Verifies a token with openssl and the printed public key, and returns its claims.
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

/// The probe's command line for a Get request that claims to come from somebody else, in unknown fields.
fn get_command() -> Result<String> {
    // GetMetadataRequest has an audience, and not the other fields, which contain "somebody" and "else".
    let payload = b"\x0a\x02db\x72\x08somebody\x7a\x04else".to_vec();
    let request = Request { service: "husk.v1.Metadata".into(), method: "Get".into(), payload, ..Default::default() };
    let bytes = request.write_to_bytes()?;
    let frame = [Vec::from(MessageHeader::new_request(1, bytes.len() as u32)), bytes].concat();
    Ok(format!("/probe ask {HOST_CID} {PORT_METADATA} {}", hex(&frame)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_response(text: &str) -> Result<GetMetadataResponse> {
    let digits = |at| u8::from_str_radix(text.get(at..at + 2).unwrap_or("none"), 16);
    let bytes =
        (0..text.len()).step_by(2).map(digits).collect::<Result<Vec<u8>, _>>().with_context(|| text.to_owned())?;
    let header = MessageHeader::from(bytes.get(..MESSAGE_HEADER_LENGTH).context("no response")?);
    let body = bytes.get(MESSAGE_HEADER_LENGTH..).context("no response")?;
    ensure!(header.length as usize == body.len(), "{} bytes of {}", body.len(), header.length);
    let response = Response::parse_from_bytes(body)?;
    ensure!(response.status.is_none(), "{:?}", response.status);
    Ok(GetMetadataResponse::parse_from_bytes(&response.payload)?)
}

fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_vm_gets_a_verifiable_token_and_only_its_own_workspace() -> Result<()> {
    let host = Host::start()?;
    let file = host.folder.path().join(format!("workspaces/{NAMESPACE}/project"));
    // Not JSON, and of the maximum size.
    let content = [SECRET.as_bytes(), &vec![0xfe; 256 * 1024 - SECRET.len()]].concat();
    fs::write(&file, &content)?;
    let inline = format!(r#"{{"password": "{SECRET}"}}"#);
    let table = [
        (String::new(), None),
        (format!("io.husk.workspace={inline}"), Some(inline.as_bytes())),
        (format!("io.husk.workspace={}", file.display()), Some(&content[..])),
    ];
    ensure!(!host.folder.path().join("etc/metadata.key").exists(), "the key exists before its first use");
    let containers = table
        .iter()
        .map(|(workspace, _)| host.containerd().detached(&host.flags(workspace), "metadata", &["sleep", "1000"]))
        .collect::<Result<Vec<_>>>()?;
    ensure!(
        !host.folder.path().join("etc/metadata.key").exists(),
        "the key was created for VMs that did not ask for it"
    );
    for (container, (workspace, expected)) in containers.iter().zip(&table) {
        let began = now()?;
        let response = parse_response(&container.script(&get_command()?)?)?;
        ensure!(
            response.workspace.as_deref() == *expected,
            "{workspace}: {:?}",
            response.workspace.map(|bytes| bytes.len())
        );
        let claims = host.claims(&response.token)?;
        let issued = claims["iat"].as_u64().context("no time of issue")?;
        ensure!((began..=now()?).contains(&issued), "{claims}");
        let expected = json!({"iss": "husk", "aud": "db", "jti": claims["jti"], "host": "node-7",
            "sandbox": container.id(), "namespace": NAMESPACE, "cid": 3, "iat": issued, "exp": issued + 90});
        ensure!(claims == expected, "{claims}, expected {expected}");
    }
    // The workspace appears in no file, log or command line of husk, and in no data passed to the guest.
    let containerd = host.containerd();
    for (container, (workspace, _)) in containers.iter().zip(&table) {
        let state = containerd.sh(&format!(
            "cat /run/husk/{NAMESPACE}/{}/*.json /run/husk/{NAMESPACE}/{}/*.log",
            container.id(),
            container.id()
        ))?;
        ensure!(state.text().contains(container.id()) && !state.text().contains(SECRET), "{}", state.text());
        let inside = container.script("cat /proc/cmdline")?;
        ensure!(inside.contains("husk.log=debug") && !inside.contains(SECRET), "{inside}");
        let (shim, _) = containerd.shim_of(container.id())?;
        let qemu = containerd.qemu_of(container.id())?;
        for process in [&shim, &qemu] {
            ensure!(!process.command.contains(SECRET), "{}", process.command);
        }
        if !workspace.contains(SECRET) {
            continue;
        }
        // The vsock annotation is in the spec sent to the guest, the workspace annotation is not.
        ensure!(memory_has(qemu.pid, "io.husk.vsock")?, "the search of the guest's memory found nothing");
        ensure!(!memory_has(qemu.pid, "io.husk.workspace")?, "the guest's memory contains the annotation");
    }
    ensure!(containerd.logged(SECRET).is_empty(), "{:?}", containerd.logged(SECRET));
    Ok(())
}

/// Whether a memfd mapping of a process contains this text. For QEMU, that is the guest's memory.
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
        // SAFETY: both are slices of these lengths, and memmem(3) reads nothing else. Unoptimised Rust would take
        // minutes.
        let found = unsafe { libc::memmem(bytes.as_ptr().cast(), bytes.len(), text.as_ptr().cast(), text.len()) };
        if !found.is_null() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn containers_of_a_pod_share_the_workspace_of_its_first_container() -> Result<()> {
    let host = Host::start()?;
    let pod = host.containerd().id("pod");
    let in_pod = format!("io.kubernetes.cri.sandbox-id={pod}");
    let [first, second] = [r#"io.husk.workspace={"first": 1}"#, r#"io.husk.workspace={"second": 2}"#];
    let start = |workspace| {
        let flags = [&host.flags(workspace)[..], &["--annotation", &in_pod]].concat();
        host.containerd().detached(&flags, "member", &["sleep", "1000"])
    };
    for container in [start(first)?, start(second)?] {
        let response = parse_response(&container.script(&get_command()?)?)?;
        ensure!(response.workspace.as_deref() == Some(br#"{"first": 1}"#), "{:?}", response.workspace);
        let claims = host.claims(&response.token)?;
        ensure!(claims["sandbox"] == json!(pod), "{claims}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_supervisor_agent_reaches_the_metadata_service_and_containers_do_not() -> Result<()> {
    let host = Host::start_with("allowed_annotations = [\"io.husk.extras.files\", \"io.husk.workspace\"]\n")?;
    let mut agent = Agent::new("serve")?;
    agent.add("/probe", &fs::read(guest_program("probe")?)?, 0o755)?;
    let flags = agent.flags();
    let flags = ["--net-host", "--mount", &host.probe, "--annotation", "io.husk.workspace={}", &flags[0], &flags[1]];
    let container = host.containerd().detached(&flags, "supervised", &["sleep", "1000"])?;
    let output = container.script(&format!("{} || echo $?", get_command()?))?;
    ensure!(output.starts_with("refused: ") && output.ends_with("\n1"), "{output}");
    // The container forwards the request through the agent, which may use vsock.
    let output = container.script(&request(&format!("run {}", get_command()?)))?;
    let response = parse_response(&output)?;
    ensure!(response.workspace.as_deref() == Some(b"{}".as_slice()), "{output}");
    ensure!(host.claims(&response.token)?["sandbox"] == container.id(), "{output}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_container_without_vsock_cannot_reach_the_metadata_service() -> Result<()> {
    let host = Host::start()?;
    let script = format!("{} || echo $?", get_command()?);
    for more in [&[][..], &["--privileged"], &["--annotation", "io.husk.vsock=false"]] {
        let flags = [&["--mount", &host.probe, "--annotation", "io.husk.workspace={}"], more].concat();
        let output = host.containerd().script(&flags, "metadata", &script)?;
        ensure!(output.starts_with("refused: ") && output.ends_with("\n1"), "{more:?}: {output}");
    }
    ensure!(!host.folder.path().join("etc/metadata.key").exists(), "a request reached the service");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn an_invalid_workspace_is_rejected_at_create_without_printing_it() -> Result<()> {
    let host = Host::start()?;
    let outside = host.folder.path().join("config.toml").display().to_string();
    let of_another = host.folder.path().join("workspaces/other/project").display().to_string();
    let folder = host.folder.path().join("workspaces").join(NAMESPACE).display().to_string();
    let large = format!("\"{SECRET}{}\"", "x".repeat(100_000));
    let table = [
        (format!("{{\"password\": {SECRET}}}"), "annotation io.husk.workspace = (21 bytes): must be JSON"),
        (outside.clone(), &format!("annotation io.husk.workspace = {outside:?}: not a file under {folder}, ")),
        (of_another.clone(), &format!("annotation io.husk.workspace = {of_another:?}: not a file under {folder}, ")),
        (format!("{large} x"), "annotation io.husk.workspace = (100011 bytes): must be JSON"),
    ];
    for (workspace, expected) in table {
        let annotation = format!("io.husk.workspace={workspace}");
        let id = host.containerd().id("refused");
        let failed = host.containerd().run(&["--annotation", &annotation], &id, &["true"]).output()?;
        let errors = failed.errors();
        ensure!(failed.code() != 0 && errors.contains(expected) && !errors.contains(SECRET), "{expected}: {errors}");
    }
    ensure!(host.containerd().logged(SECRET).is_empty(), "{:?}", host.containerd().logged(SECRET));
    Ok(())
}
