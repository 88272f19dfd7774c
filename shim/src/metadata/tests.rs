//! The service as a guest sees it: with ttrpc's own client, and with bytes that no client sends.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use base64ct::{Base64UrlUnpadded, Encoding};
use ed25519_dalek::{Signature, VerifyingKey};
use futures::stream;
use husk_protos::metadata::{GetMetadataRequest, GetMetadataResponse};
use husk_protos::metadata_ttrpc::MetadataClient;
use protobuf::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::with_duration;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader, Request, Response};

use super::issuer::{Issuer, response};
use super::key::Key;
use super::one_vm::{OneVm, provide, serve_vm, workspace_file};
use super::service::{BURST, CONNECTIONS, MetadataSource, REQUEST_BYTES, Refusal, serve};
use super::token::Identity;
use crate::config::settings::TokenSettings;
use crate::config::workspace::{MAX_BYTES, Workspace};
use crate::guest::link::Link;

const WAIT: Duration = Duration::from_secs(60);

/// Responds to each CID with its own token.
struct ByCid;

#[async_trait]
impl MetadataSource for ByCid {
    async fn get(&self, cid: u32, audience: String) -> Result<GetMetadataResponse, Refusal> {
        let token =
            if audience == "husk" { format!("token of {cid}") } else { format!("token of {cid} for {audience}") };
        Ok(response(token, None))
    }
}

/// Serves a source to the guests that dial.
struct Host(mpsc::UnboundedSender<(DuplexStream, u32)>);

impl Host {
    fn start(source: impl MetadataSource) -> Self {
        let (dial, mut dialed) = mpsc::unbounded_channel();
        let incoming = stream::poll_fn(move |cx| dialed.poll_recv(cx));
        tokio::spawn(serve(incoming, Arc::new(source)));
        Self(dial)
    }

    fn dial(&self, cid: u32) -> DuplexStream {
        let (guest_end, host_end) = duplex(64 * 1024);
        self.0.send((host_end, cid)).unwrap();
        guest_end
    }

    fn client(&self, cid: u32) -> MetadataClient {
        MetadataClient::new(Client::new(Socket::new(self.dial(cid))))
    }
}

async fn get(client: &MetadataClient) -> ttrpc::Result<GetMetadataResponse> {
    client.get(with_duration(WAIT), &GetMetadataRequest::new()).await
}

fn one_vm(key: &Path, workspace: Option<&str>) -> OneVm {
    let settings =
        TokenSettings { key: key.to_owned(), lifetime: Duration::from_secs(300), host: Some("node-7".into()) };
    OneVm {
        identity: Identity { namespace: "ns".into(), sandbox: "s1".into(), cid: 3 },
        issuer: Issuer::new(settings),
        workspace: workspace.map(|text| Workspace::read(text, None, "ns").unwrap()),
    }
}

#[tokio::test]
async fn a_vm_gets_a_verifiable_token_and_its_unchanged_workspace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.key");
    let large = format!("\"{}\"", "x".repeat(MAX_BYTES - 2));
    for workspace in [None, Some("{}"), Some(r#"{"a": 1}"#), Some(&large)] {
        let host = Host::start(one_vm(&path, workspace));
        let client = host.client(3);
        let mut ids = std::collections::HashSet::new();
        for audience in ["", "https://db.example"] {
            let request = GetMetadataRequest { audience: audience.into(), ..Default::default() };
            let response = client.get(with_duration(WAIT), &request).await.unwrap();
            assert_eq!(response.workspace.as_deref(), workspace.map(str::as_bytes));
            let (signed, signature) = response.token.rsplit_once('.').unwrap();
            let signature = Signature::from_slice(&Base64UrlUnpadded::decode_vec(signature).unwrap()).unwrap();
            let public = Key::read_or_create(&path).unwrap().public();
            let verifier = VerifyingKey::from_bytes(&public.bytes).unwrap();
            verifier.verify_strict(signed.as_bytes(), &signature).unwrap();
            let claims = Base64UrlUnpadded::decode_vec(signed.split_once('.').unwrap().1).unwrap();
            let claims: Value = serde_json::from_slice(&claims).unwrap();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
            let iat = claims["iat"].as_u64().unwrap();
            assert!((now - 60..=now).contains(&iat), "{claims}");
            let audience = if audience.is_empty() { "husk" } else { audience };
            let expected = json!({"iss": "husk", "aud": audience, "jti": claims["jti"], "host": "node-7", "sandbox": "s1",
                "namespace": "ns", "cid": 3, "iat": iat, "exp": iat + 300});
            assert_eq!(claims, expected);
            let id = claims["jti"].as_str().unwrap().to_owned();
            assert!(id.len() == 22 && ids.insert(id), "{claims}");
        }
    }
}

#[tokio::test]
async fn the_key_is_not_created_before_the_first_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.key");
    let host = Host::start(one_vm(&path, None));
    let client = host.client(3);
    assert!(!path.exists());
    get(&client).await.unwrap();
    assert!(path.exists());
}

#[tokio::test]
async fn an_untrusted_key_is_reported_in_the_log_and_not_to_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.key");
    std::fs::write(&path, "secret").unwrap();
    let vm = one_vm(&path, Some("{}"));
    assert!(vm.issuer.may_log() && !vm.issuer.may_log(), "a guest can fill the log");
    let host = Host::start(vm);
    let client = host.client(3);
    for _ in 0..2 {
        match get(&client).await {
            Err(ttrpc::Error::RpcStatus(status)) => {
                assert_eq!(status.code(), Code::FAILED_PRECONDITION);
                assert_eq!(status.message, "the host cannot sign a token; the host's log has the reason");
            }
            other => panic!("{other:?}"),
        }
    }
    // A repaired key is used at once.
    std::fs::remove_file(&path).unwrap();
    get(&client).await.unwrap();
}

#[tokio::test]
async fn each_vm_gets_its_own_metadata_whatever_it_requests() {
    let host = Host::start(ByCid);
    for cid in [4, 5, 65535] {
        assert_eq!(get(&host.client(cid)).await.unwrap().token, format!("token of {cid}"));
        // A request that claims to come from another VM, in fields that the message does not have.
        let payload = b"\x72\x01s\x7a\x02ns\x18\x05".to_vec();
        let mut stream = host.dial(cid);
        stream.write_all(&request("husk.v1.Metadata", "Get", payload)).await.unwrap();
        let (_, response) = receive(&mut stream).await.unwrap();
        let metadata = GetMetadataResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(metadata.token, format!("token of {cid}"));
    }
}

/// The bytes of a request.
fn request(service: &str, method: &str, payload: Vec<u8>) -> Vec<u8> {
    let request = Request { service: service.into(), method: method.into(), payload, ..Default::default() };
    let bytes = request.write_to_bytes().unwrap();
    [Vec::from(MessageHeader::new_request(1, bytes.len() as u32)), bytes].concat()
}

/// The next response; none if the host has closed the connection.
async fn receive(stream: &mut DuplexStream) -> Option<(MessageHeader, Response)> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    timeout_or_end(stream.read_exact(&mut header)).await?;
    let header = MessageHeader::from(header);
    let mut bytes = vec![0; header.length as usize];
    timeout_or_end(stream.read_exact(&mut bytes)).await?;
    Some((header, Response::parse_from_bytes(&bytes).unwrap()))
}

async fn timeout_or_end(read: impl Future<Output = std::io::Result<usize>>) -> Option<()> {
    tokio::time::timeout(WAIT, read).await.expect("the host neither responds nor closes the connection").ok().map(drop)
}

#[tokio::test]
async fn invalid_requests_are_rejected_or_end_the_connection() {
    let get = || request("husk.v1.Metadata", "Get", Vec::new());
    let frame = |type_, length: u32| {
        let mut bytes = Vec::from(MessageHeader::new_request(1, length));
        bytes[8] = type_;
        bytes
    };
    let long = GetMetadataRequest { audience: "x".repeat(256), ..Default::default() }.write_to_bytes().unwrap();
    let table: [(&str, Vec<u8>, Option<Code>); 10] = [
        ("a long audience", request("husk.v1.Metadata", "Get", long), Some(Code::INVALID_ARGUMENT)),
        ("another method", request("husk.v1.Metadata", "Put", Vec::new()), Some(Code::UNIMPLEMENTED)),
        ("another service", request("husk.v1.System", "Get", Vec::new()), Some(Code::UNIMPLEMENTED)),
        ("an invalid payload", request("husk.v1.Metadata", "Get", vec![0xff; 9]), Some(Code::INVALID_ARGUMENT)),
        ("an invalid request", [frame(1, 3), vec![0xff; 3]].concat(), None),
        ("a response", frame(2, 0), None),
        ("a frame of a stream", frame(3, 0), None),
        ("a too large request", frame(1, REQUEST_BYTES + 1), None),
        ("4 GiB", frame(1, u32::MAX), None),
        ("garbage", vec![0xff; 64], None),
    ];
    let host = Host::start(ByCid);
    for (name, bytes, expected) in table {
        let mut stream = host.dial(4);
        stream.write_all(&bytes).await.unwrap();
        let code = receive(&mut stream).await.map(|(_, response)| response.status.code());
        assert_eq!(code, expected, "{name}");
        // The connection continues after an error response.
        if expected.is_some() {
            stream.write_all(&get()).await.unwrap();
            assert!(receive(&mut stream).await.is_some_and(|(_, response)| response.status.is_none()), "{name}");
        }
    }
    // The service accepts further connections.
    assert!(super::tests::get(&host.client(4)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stops_sending_is_disconnected() {
    let host = Host::start(one_vm(Path::new("/no/such/folder/which/is/not/made/metadata.key"), None));
    let whole = request("husk.v1.Metadata", "Get", Vec::new());
    for sent in [0, 1, MESSAGE_HEADER_LENGTH, whole.len() - 1] {
        let mut stream = host.dial(4);
        stream.write_all(&whole[..sent]).await.unwrap();
        let began = tokio::time::Instant::now();
        assert!(receive(&mut stream).await.is_none(), "after {sent} bytes");
        assert_eq!(began.elapsed().as_secs(), 10, "after {sent} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_reads_no_responses_is_disconnected_and_queues_at_most_one_in_the_host() {
    struct Large;
    #[async_trait]
    impl MetadataSource for Large {
        async fn get(&self, _cid: u32, _audience: String) -> Result<GetMetadataResponse, Refusal> {
            Ok(response("x".repeat(256 * 1024), None))
        }
    }
    let host = Host::start(Large);
    let mut stream = host.dial(4);
    let whole = request("husk.v1.Metadata", "Get", Vec::new());
    // The socket fills up: the host reads the next request only after the guest has read the response.
    let sent = async {
        loop {
            stream.write_all(&whole).await?;
        }
        #[allow(unreachable_code)]
        Ok::<(), std::io::Error>(())
    };
    let ended = tokio::time::timeout(WAIT, sent).await.expect("the host keeps reading requests");
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn the_connections_of_each_vm_are_limited_separately() {
    let host = Host::start(ByCid);
    let held: Vec<_> = (0..CONNECTIONS).map(|_| host.client(4)).collect();
    for client in &held {
        get(client).await.unwrap();
    }
    assert!(get(&host.client(4)).await.is_err(), "one connection too many");
    assert_eq!(get(&host.client(5)).await.unwrap().token, "token of 5");
    drop(held);
    // The host notices the closed connections with a delay.
    let deadline = tokio::time::Instant::now() + WAIT;
    while get(&host.client(4)).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the closed connections still count");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_asks_again_and_again_is_refused_until_time_has_passed() {
    let host = Host::start(ByCid);
    let refused = |got: ttrpc::Result<GetMetadataResponse>| match got {
        Err(ttrpc::Error::RpcStatus(status)) => status.code() == Code::RESOURCE_EXHAUSTED,
        _ => false,
    };
    for _ in 0..BURST as usize {
        get(&host.client(4)).await.unwrap();
    }
    // Neither another connection nor an invalid request is a way around.
    assert!(refused(get(&host.client(4)).await));
    let mut stream = host.dial(4);
    stream.write_all(&request("husk.v1.Metadata", "Put", Vec::new())).await.unwrap();
    let (_, response) = receive(&mut stream).await.unwrap();
    assert_eq!(response.status.code(), Code::RESOURCE_EXHAUSTED);
    assert_eq!(get(&host.client(5)).await.unwrap().token, "token of 5");
    tokio::time::advance(Duration::from_secs(1)).await;
    get(&host.client(4)).await.unwrap();
    assert!(refused(get(&host.client(4)).await));
}

#[tokio::test]
async fn the_service_ends_with_the_device() {
    let (device, _qemu_end) = husk_vsock::Device::start(3).unwrap();
    let vm = one_vm(Path::new("/none"), None);
    let listener = device.listen(husk_protos::PORT_METADATA).unwrap();
    let service = tokio::spawn(serve_vm(listener, vm.identity.clone(), vm.issuer.settings.clone(), None));
    assert!(matches!(device.listen(husk_protos::PORT_METADATA), Err(husk_vsock::VsockError::PortInUse(_))));
    device.stop();
    tokio::time::timeout(WAIT, service).await.expect("the service outlives the device").unwrap();
}

#[tokio::test]
async fn the_hosts_service_finds_the_workspace_of_the_last_boot_in_a_file_for_root_only() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let vm = one_vm(Path::new("/none"), None);
    for text in [None, Some("{}"), Some("[1]"), None, None] {
        let workspace = text.map(|text| Workspace::read(text, None, "ns").unwrap());
        let (identity, tokens) = (vm.identity.clone(), &vm.issuer.settings);
        provide(&Link::Kernel(4), identity, tokens, workspace.as_ref(), folder.path()).unwrap();
        let path = workspace_file(folder.path());
        assert_eq!(std::fs::read_to_string(&path).ok().as_deref(), text);
        if text.is_some() {
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        }
        assert_eq!(Workspace::read_back(&path).unwrap(), workspace);
    }
    std::fs::write(folder.path().join("large"), vec![7; MAX_BYTES + 1]).unwrap();
    assert!(Workspace::read_back(&folder.path().join("large")).is_err());
}
