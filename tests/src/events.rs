//! Events that shims publish: as `ctr events` shows them, or received by the test in place of containerd.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::{Events, create_events, ttrpc};
use husk_protos::lock::lock;
use serde_json::Value;

use crate::command::wait_for;
use crate::containerd::{Containerd, NAMESPACE};
use crate::process;

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// Its fields, as containerd's JSON names them.
    pub fields: Value,
}

impl Event {
    /// A field as text.
    pub fn text(&self, field: &str) -> &str {
        self.fields[field].as_str().unwrap_or_default()
    }
}

/// A running `ctr events`.
pub struct Watch {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Watch {
    /// Starts `ctr events`. It misses no event after this function has returned.
    pub fn start(containerd: &Containerd) -> Result<Self> {
        let mut command = containerd.ctr(["events"]).command();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let stdout = child.stdout.take().context("ctr events has no stdout")?;
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let watch = Self { child, lines };
        // ctr does not report when it has subscribed: cause events until one arrives.
        let mut round = 0;
        wait_for(Duration::from_secs(60), "ctr events shows an event", || {
            round += 1;
            let label = format!("round={round}");
            let made = containerd.ctr(["namespaces", "label", NAMESPACE]).arg(label).ok();
            let received = watch.lines.recv_timeout(Duration::from_millis(100)).is_ok();
            made.map(|_| received.then_some(())).transpose()
        })??;
        Ok(watch)
    }

    /// Collects the events of container `id` up to the first for which `last` holds.
    pub fn collect(&self, id: &str, deadline: Duration, last: impl Fn(&Event) -> bool) -> Result<Vec<Event>> {
        let started = Instant::now();
        let mut events: Vec<Event> = Vec::new();
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            let Ok(line) = self.lines.recv_timeout(left) else {
                bail!("the last event did not arrive within {deadline:?}; received: {events:#?}");
            };
            // "<date> <time> <zone> <zone> <namespace> <topic> <json>"
            let Some((head, json)) = line.find('{').map(|at| line.split_at(at)) else { continue };
            let topic = head.split_whitespace().next_back().unwrap_or_default().to_owned();
            let fields: Value = serde_json::from_str(json).with_context(|| format!("event line {line}"))?;
            if topic.starts_with("/tasks/") && fields["container_id"] == id {
                let event = Event { topic, fields };
                let done = last(&event);
                events.push(event);
                if done {
                    return Ok(events);
                }
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        process::kill_tree(self.child.id() as i32);
        // If the wait fails, the killed child is gone anyway.
        let _ = self.child.wait();
    }
}

/// An event as the shim sent it.
#[derive(Debug, Clone)]
pub struct Published {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// containerd's message.
    pub event: Any,
}

impl Published {
    /// Decodes the event as the message type that it names.
    pub fn decode<M: containerd_shim_protos::protobuf::MessageFull>(&self) -> Result<M> {
        // containerd's typeurl leaves out the "type.googleapis.com/" that protobuf's own packing writes.
        if self.event.type_url.rsplit('/').next() != Some(M::descriptor().full_name()) {
            bail!("{} is a {}, not a {}", self.topic, self.event.type_url, M::descriptor().full_name());
        }
        Ok(M::parse_from_bytes(&self.event.value)?)
    }
}

/// A server in place of containerd's event service.
pub struct Sink {
    server: Option<ttrpc::Server>,
    address: String,
    sender: mpsc::Sender<Published>,
    events: Mutex<mpsc::Receiver<Published>>,
    _folder: tempfile::TempDir,
}

struct Forwarder(Mutex<mpsc::Sender<Published>>);

impl Events for Forwarder {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        let published = Published { topic: envelope.topic, event: envelope.event.unwrap_or_default() };
        // The receiver is gone when the test is over.
        let _ = lock(&self.0).send(published);
        Ok(Empty::new())
    }
}

impl Sink {
    /// Starts to serve.
    pub fn start() -> Result<Self> {
        let mut sink = Self::closed()?;
        sink.open()?;
        Ok(sink)
    }

    /// A sink that is unreachable before [`Self::open`], like a stopped containerd.
    pub fn closed() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("husk-events").tempdir()?;
        let address = folder.path().join("sock").display().to_string();
        let (sender, events) = mpsc::channel();
        Ok(Self { server: None, address, sender, events: Mutex::new(events), _folder: folder })
    }

    /// Starts to serve.
    pub fn open(&mut self) -> Result<()> {
        let service = Arc::new(Forwarder(Mutex::new(self.sender.clone())));
        let services: HashMap<_, _> = create_events(service);
        let mut server = ttrpc::Server::new().bind(&format!("unix://{}", self.address))?.register_service(services);
        server.start()?;
        self.server = Some(server);
        Ok(())
    }

    /// The value of a shim's `TTRPC_ADDRESS`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// All events up to and including the first with this topic.
    pub fn until(&self, topic: &str, deadline: Duration) -> Result<Vec<Published>> {
        let started = Instant::now();
        let events = lock(&self.events);
        let mut seen: Vec<Published> = Vec::new();
        loop {
            match events.recv_timeout(deadline.saturating_sub(started.elapsed())) {
                Ok(event) => seen.push(event),
                Err(_) => bail!("no {topic} within {deadline:?}; received: {seen:#?}"),
            }
            if seen.last().is_some_and(|event| event.topic == topic) {
                return Ok(seen);
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // Shutting down waits for open connections, which the test has no reason to do.
        if let Some(server) = self.server.take() {
            thread::spawn(move || server.shutdown());
        }
    }
}
