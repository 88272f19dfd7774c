//! The guest's answers to calls, and its streams: TTRPC, as ttrpc's client reads it from a connection, and what the shim
//! makes of it.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, PidsRequest, StartRequest, StateRequest, StateResponse, StatsRequest, Status,
};
use containerd_shim_protos::shim_async::TaskClient;
use husk_protos::bundle::PutBundleRequest;
use husk_protos::bundle_ttrpc::BundleClient;
use husk_protos::chain::Chain;
use husk_protos::debug::Process as DebugProcess;
use husk_protos::debug_ttrpc::DebugClient;
use husk_protos::events::SubscribeRequest;
use husk_protos::events_ttrpc::EventsClient;
use husk_protos::metered::Metered;
use husk_protos::network::NetworkStatusRequest;
use husk_protos::network_ttrpc::NetworkClient;
use husk_protos::relay::CONNECTED;
use husk_protos::stdio::{InputChunk, StreamRequest};
use husk_protos::stdio_ttrpc::StdioClient;
use husk_protos::system::ClockAdjustment;
use husk_protos::system_ttrpc::SystemClient;
use husk_protos::{METRICS, PROCESS_DETAILS, RECEIVE_WINDOW};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_duration};
use ttrpc::proto::{MessageHeader, Response, Status as CallStatus};

use super::checks::harmless;
use super::wire::{Wire, run};
use crate::guest::client::{GuestError, Metering, open_raw_stream};
use crate::guest::{network, replies};
use crate::host::text::LONGEST;
use crate::sandbox::SandboxError;
use crate::sandbox::container::guest_reply::{self, PROCESSES_MAX, STATS_MAX};
use crate::sandbox::container::process::{Exit, Process};
use crate::stdio::{self, Stdio};
use crate::task_service::to_ttrpc;

/// The host's time.
const NOW: i64 = 1_700_000_000;
/// The stream of the first call on a connection.
const STREAM: u32 = 1;
/// No input lasts as long.
const DEADLINE: Duration = Duration::from_secs(3600);

/// The answer to a call: a byte that selects the call, one that selects what the rest is, and the rest.
pub fn answers(bytes: &[u8]) {
    let [call, kind, rest @ ..] = bytes else { return };
    let client = || Client::new(replies::socket(Wire::answers(1, answer(*kind, rest))));
    let answered = run(async {
        let client = client();
        match call % 10 {
            0..4 => task(*call, *kind, client).await,
            4 => {
                let answer = NetworkClient::new(client).status(context(), &NetworkStatusRequest::new()).await?;
                links(network::read(answer));
                Ok(())
            }
            5 => TaskClient::new(client)
                .create(context(), &CreateTaskRequest::new())
                .await
                .map(drop)
                .map_err(SandboxError::from),
            6 => TaskClient::new(client)
                .start(context(), &StartRequest::new())
                .await
                .map(drop)
                .map_err(SandboxError::from),
            7 => DebugClient::new(client)
                .wait(Context::default(), &DebugProcess::new())
                .await
                .map(drop)
                .map_err(SandboxError::from),
            8 => SystemClient::new(client)
                .adjust_clock(context(), &ClockAdjustment::new())
                .await
                .map(drop)
                .map_err(SandboxError::from),
            _ => BundleClient::new(client)
                .put(context(), &PutBundleRequest::new())
                .await
                .map(drop)
                .map_err(SandboxError::from),
        }
    });
    if let Err(error) = answered {
        let ttrpc::Error::RpcStatus(status) = to_ttrpc(error) else { panic!("containerd gets no status") };
        harmless(&status.message, LONGEST);
    }
}

fn context() -> Context {
    with_duration(DEADLINE)
}

/// The bytes on the connection: those of the input, as they are or as a part of a valid answer.
fn answer(kind: u8, rest: &[u8]) -> Vec<u8> {
    let response = match kind % 4 {
        0 => return rest.to_vec(),
        1 => rest.to_vec(),
        2 => encoded(&Response { payload: rest.to_vec(), ..Default::default() }),
        _ => {
            let (code, message) = rest.split_first().unwrap_or((&2, &[]));
            let message = String::from_utf8_lossy(message).into_owned();
            let status =
                CallStatus { code: protobuf::EnumOrUnknown::from_i32((*code).into()), message, ..Default::default() };
            encoded(&Response { status: MessageField::some(status), ..Default::default() })
        }
    };
    let mut frame: Vec<u8> = MessageHeader::new_response(STREAM, response.len() as u32).into();
    frame.extend_from_slice(&response);
    frame
}

fn encoded(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("a message")
}

/// The calls whose answers containerd receives.
async fn task(call: u8, kind: u8, client: Client) -> Result<(), SandboxError> {
    let (task, now) = (TaskClient::new(client), Timestamp { seconds: NOW, ..Default::default() });
    let recorded = (kind & 0x10 != 0).then(|| Exit { status: 7, at: now.clone() });
    let is_recorded = recorded.is_some();
    match call % 10 {
        0 => {
            let state = guest_reply::state(&task.state(context(), &StateRequest::new()).await?, recorded, &now);
            let stopped = state.status.enum_value() == Ok(Status::STOPPED);
            assert!(state.status.enum_value().is_ok() && (stopped || !is_recorded), "{state}");
            if stopped {
                exit(state.exit_status, &state.exited_at, is_recorded);
            }
            let StateResponse { pid, status, exit_status, exited_at, .. } = state.clone();
            assert_eq!(state, StateResponse { pid, status, exit_status, exited_at, ..Default::default() });
        }
        1 => {
            let deleted = guest_reply::deleted(&task.delete(context(), &DeleteRequest::new()).await?, recorded, &now);
            exit(deleted.exit_status, &deleted.exited_at, is_recorded);
            assert!(deleted.special_fields.unknown_fields().iter().next().is_none());
        }
        2 => {
            let process = Arc::new(Process::new("e", Stdio::default(), 4242));
            process.set_guest_pid(7);
            let find = |pid| (pid == 7).then(|| process.clone());
            let list = guest_reply::processes(&task.pids(context(), &PidsRequest::new()).await?, find)?;
            assert!(list.processes.len() <= PROCESSES_MAX, "{} processes", list.processes.len());
            for listed in &list.processes {
                assert_eq!(listed.pid == 4242 && listed.info.is_some(), listed.info.is_some(), "{listed}");
                assert!(listed.info.iter().all(|info| info.type_url == PROCESS_DETAILS), "{listed}");
            }
        }
        _ => {
            let stats = guest_reply::stats(task.stats(context(), &StatsRequest::new()).await?)?;
            assert!(stats.stats.type_url == METRICS && stats.stats.value.len() <= STATS_MAX);
        }
    }
    Ok(())
}

/// Checks how a process ended.
fn exit(status: u32, at: &MessageField<Timestamp>, recorded: bool) {
    let at = at.as_ref().expect("a time");
    assert!(status <= 255 && (0..=NOW + 60).contains(&at.seconds) && (0..1_000_000_000).contains(&at.nanos), "{at}");
    assert!(!recorded || (status, at.seconds) == (7, NOW), "the shim's record does not count");
}

/// Checks what `husk status` shows of the guest's links.
fn links(report: network::Report) {
    assert!(report.links.len() <= network::LINKS_MAX, "{} links", report.links.len());
    for (mac, link) in &report.links {
        harmless(mac.as_deref().unwrap_or_default(), LONGEST);
        harmless(&link.name, network::NAME_MAX);
        assert!(link.addresses.len() <= network::ADDRESSES_MAX, "{} addresses", link.addresses.len());
        link.addresses.iter().for_each(|address| harmless(address, LONGEST));
    }
    if let Some(problem) = &report.problem {
        harmless(problem, 10 * LONGEST);
    }
}

/// A stream of the guest: a byte that selects it, and what the guest sends: as it is, or as frames, each after a byte with
/// its flags and two with its length.
pub fn streams(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    if kind & 8 != 0 {
        return raw_stream(usize::from(kind >> 4) * 64, rest);
    }
    // Input is a request, a chunk and the end.
    let messages = if kind % 4 == 3 { 3 } else { 1 };
    let wire = Wire::answers(messages, if kind & 4 == 0 { rest.to_vec() } else { frames(rest) });
    let ended = run(async {
        let (socket, meter) = Metered::new(wire, RECEIVE_WINDOW);
        let client = Client::new(Socket::new(socket));
        match kind % 4 {
            0 | 1 => {
                let stream = StdioClient::new(client).output(Context::default(), &StreamRequest::new()).await?;
                let (mut stream, mut received) = (Metering::new(stream, meter), 0);
                while let Some(chunk) = stream.recv().await? {
                    received += chunk.data.len();
                }
                assert!(received <= rest.len(), "{received} bytes of {}", rest.len());
            }
            2 => {
                let stream = EventsClient::new(client).subscribe(Context::default(), &SubscribeRequest::new()).await?;
                let mut stream = Metering::new(stream, meter);
                while stream.recv().await?.is_some() {}
            }
            _ => {
                let mut stream = StdioClient::new(client).input(Context::default()).await?;
                stream.send(&InputChunk::new()).await?;
                stream.close_and_recv().await?;
            }
        }
        Ok::<_, GuestError>(())
    });
    if let Err(error) = ended {
        harmless(&error.to_string(), LONGEST + 100);
    }
}

/// A raw stream, of which so many bytes arrive at a time: an output, of which everything after the guest's reply is
/// delivered.
fn raw_stream(piece: usize, sent: &[u8]) {
    let opened = run(async {
        let stream = open_raw_stream(Wire::sends(sent, piece), &StreamRequest::new()).await?;
        assert_eq!(sent.first(), Some(&CONNECTED), "a stream that the guest did not open");
        let delivered = stdio::deliver_raw(stream).await;
        assert_eq!(delivered, sent.len() as u64 - 1);
        Ok::<_, GuestError>(())
    });
    if let Err(error) = opened {
        assert_ne!(sent.first(), Some(&CONNECTED), "{error}");
        harmless(&Chain(&error).to_string(), LONGEST);
    }
}

fn frames(mut rest: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    while let [flags, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let (message, after) = after.split_at(after.len().min(length));
        let mut header = MessageHeader::new_data(STREAM, message.len() as u32);
        header.set_flags(flags & 7);
        frames.extend(Vec::from(header));
        frames.extend_from_slice(message);
        rest = after;
    }
    frames
}
