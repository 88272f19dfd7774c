//! What shims publish: as `ctr events` shows it, or taken in by the test in containerd's place.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::{Events, create_events, ttrpc};
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
    /// Starts to watch; from its return on no event is missed.
    pub fn start(containerd: &Containerd) -> Result<Self> {
        let mut command = containerd.ctr(["events"]).command();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let stdout = child.stdout.take().context("ctr events has no stdout")?;
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let watch = Self { child, lines };
        // ctr doesn't say when it is subscribed: make noise until some of it comes through.
        let mut round = 0;
        wait_for(Duration::from_secs(20), "ctr events shows something", || {
            round += 1;
            let label = format!("round={round}");
            let made = containerd.ctr(["namespaces", "label", NAMESPACE]).arg(label).ok();
            let heard = watch.lines.recv_timeout(Duration::from_millis(100)).is_ok();
            made.map(|_| heard.then_some(())).transpose()
        })??;
        Ok(watch)
    }

    /// The events of the container `id` until one for which `last` holds.
    pub fn collect(&self, id: &str, deadline: Duration, last: impl Fn(&Event) -> bool) -> Result<Vec<Event>> {
        let started = Instant::now();
        let mut events: Vec<Event> = Vec::new();
        loop {
            let left = deadline.saturating_sub(started.elapsed());
            let Ok(line) = self.lines.recv_timeout(left) else {
                bail!("the last event did not come within {deadline:?}; these did: {events:#?}");
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
        // A child that is killed and can't be waited for is gone all the same.
        let _ = self.child.wait();
    }
}

/// An event as it came from a shim.
#[derive(Debug, Clone)]
pub struct Published {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// containerd's message.
    pub event: Any,
}

impl Published {
    /// The event as the message that its type says it is.
    pub fn decode<M: containerd_shim_protos::protobuf::MessageFull>(&self) -> Result<M> {
        // containerd's typeurl leaves out the "type.googleapis.com/" that protobuf's own packing writes.
        if self.event.type_url.rsplit('/').next() != Some(M::descriptor().full_name()) {
            bail!("{} is a {}, not a {}", self.topic, self.event.type_url, M::descriptor().full_name());
        }
        Ok(M::parse_from_bytes(&self.event.value)?)
    }
}

/// A server that stands where containerd's event service would.
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
        // Nobody listens any more when the test is over.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(published);
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

    /// One that nobody reaches before [`Self::open`]: as a containerd that is down.
    pub fn closed() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("husk-events").tempdir()?;
        let address = folder.path().join("sock").display().to_string();
        let (sender, events) = mpsc::channel();
        Ok(Self { server: None, address, sender, events: Mutex::new(events), _folder: folder })
    }

    /// From now on it serves.
    pub fn open(&mut self) -> Result<()> {
        let service = Arc::new(Forwarder(Mutex::new(self.sender.clone())));
        let services: HashMap<_, _> = create_events(service);
        let mut server = ttrpc::Server::new().bind(&format!("unix://{}", self.address))?.register_service(services);
        server.start()?;
        self.server = Some(server);
        Ok(())
    }

    /// What a shim gets as `TTRPC_ADDRESS`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// All events until one with this topic, that one included.
    pub fn until(&self, topic: &str, deadline: Duration) -> Result<Vec<Published>> {
        let started = Instant::now();
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen: Vec<Published> = Vec::new();
        loop {
            match events.recv_timeout(deadline.saturating_sub(started.elapsed())) {
                Ok(event) => seen.push(event),
                Err(_) => bail!("no {topic} within {deadline:?}; these came: {seen:#?}"),
            }
            if seen.last().is_some_and(|event| event.topic == topic) {
                return Ok(seen);
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // It waits for its connections, and the test has no reason to.
        if let Some(server) = self.server.take() {
            thread::spawn(move || server.shutdown());
        }
    }
}
