//! The publisher: hands events to containerd one after the other, in the order in which they were given.
//!
//! An event that containerd does not take (it is being restarted, say) is tried again before the next one is, so that TaskExit
//! never overtakes TaskStart.

use std::time::Duration;

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::Client;
use ttrpc::context::with_duration;

use crate::state::recent::{EventKind, Recent, task};

/// Events that wait for containerd. Past that, those who publish wait.
const QUEUE: usize = 1024;
/// Deadline of one attempt.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pauses between attempts grow up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

enum Item {
    Event(Box<Envelope>),
    /// Answered when all that was queued before has been handed over.
    Flush(oneshot::Sender<()>),
}

/// The queue's entry. Clones share the queue.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
    recent: Recent,
}

impl Publisher {
    /// Starts the publisher towards containerd's TTRPC socket at `address` (a path, or `unix://` and a path). What it is given is noted in `recent`,
    /// whether containerd takes it or not.
    pub fn start(address: &str, namespace: &str, recent: Recent) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        tokio::spawn(run(address, items));
        Self { namespace: namespace.to_owned(), queue, recent }
    }

    /// Queues an event; waits while the queue is full.
    pub async fn publish(&self, topic: &str, event: Any, timestamp: Timestamp) {
        if self.queue.send(self.item(topic, event, timestamp)).await.is_err() {
            tracing::error!(topic, "event lost: the publisher has ended");
        }
    }

    /// Queues an event on which nothing depends; while the queue is full, because containerd has not been there for long, it is dropped.
    pub fn offer(&self, topic: &str, event: Any, timestamp: Timestamp) {
        if let Err(error) = self.queue.try_send(self.item(topic, event, timestamp)) {
            tracing::warn!(topic, %error, "event dropped: containerd takes none");
        }
    }

    fn item(&self, topic: &str, event: Any, timestamp: Timestamp) -> Item {
        self.recent.note(EventKind::Task, topic, task::fields(topic, &event));
        Item::Event(Box::new(Envelope {
            timestamp: MessageField::some(timestamp),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        }))
    }

    /// Waits until all that was queued so far has been handed over; false if the deadline passed first.
    pub async fn flush(&self, deadline: Duration) -> bool {
        let (done, flushed) = oneshot::channel();
        let flush = async { self.queue.send(Item::Flush(done)).await.is_ok() && flushed.await.is_ok() };
        tokio::time::timeout(deadline, flush).await.unwrap_or(false)
    }
}

#[cfg(test)]
impl Publisher {
    /// One that keeps what it is given for the test.
    pub fn kept() -> (Self, Kept) {
        let (queue, items) = mpsc::channel(QUEUE);
        (Self { namespace: "test".to_owned(), queue, recent: Recent::default() }, Kept(items))
    }
}

/// What a publisher of a test was given.
#[cfg(test)]
pub struct Kept(mpsc::Receiver<Item>);

#[cfg(test)]
impl Kept {
    /// The next event; none if there is none yet.
    pub fn take(&mut self) -> Option<Envelope> {
        match self.0.try_recv() {
            Ok(Item::Event(envelope)) => Some(*envelope),
            Ok(Item::Flush(_)) | Err(_) => None,
        }
    }
}

async fn run(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => forward(&address, &mut client, *envelope).await,
            Item::Flush(done) => {
                // Whoever asked may have given up.
                let _ = done.send(());
            }
        }
    }
}

/// Tries until containerd has taken the event.
async fn forward(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    let mut pause = Duration::from_millis(10);
    loop {
        match attempt(address, client, &request).await {
            Ok(()) => return,
            // containerd has it and won't have it: sending it again would change nothing.
            Err(ttrpc::Error::RpcStatus(status)) => {
                tracing::error!(topic = request.envelope.topic, status = status.message, "containerd refused an event");
                return;
            }
            Err(error) => {
                tracing::warn!(topic = request.envelope.topic, %error, "event not delivered yet; trying again");
                *client = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

async fn attempt(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    if client.is_none() {
        *client = Some(EventsClient::new(Client::connect(address).await?));
    }
    if let Some(client) = client {
        client.forward(with_duration(ATTEMPT), request).await?;
    }
    Ok(())
}
