//! Sends events to containerd, one after the other, in the order in which they were published.
//!
//! The publisher repeats an event that containerd does not accept, for example during its restart, before it sends the
//! next: TaskExit never overtakes TaskStart.

use std::time::Duration;

use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use husk_protos::chain::Chain;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::Client;
use ttrpc::context::with_duration;

use crate::state::recent::{EventKind, Recent, task};

/// Events that may wait for containerd. While the queue is full, publishers wait.
const QUEUE: usize = 1024;
/// Deadline of one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between attempts doubles from the first to the last of these.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(2));

enum Item {
    Event(Box<Envelope>),
    /// Answered after everything queued before it has been sent.
    Flush(oneshot::Sender<()>),
}

/// Publishes events. Clones share one queue.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
    recent: Recent,
}

impl Publisher {
    /// Starts a publisher for containerd's TTRPC socket at `address` (a path, or `unix://` and a path). Each event is
    /// also recorded in `recent`, whether containerd accepts it or not.
    pub(crate) fn start(address: &str, namespace: &str, recent: Recent) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        tokio::spawn(run(address, items));
        Self { namespace: namespace.to_owned(), queue, recent }
    }

    /// Queues an event; waits while the queue is full.
    pub(crate) async fn publish(&self, topic: &str, event: Any, timestamp: Timestamp) {
        if self.queue.send(self.item(topic, event, timestamp)).await.is_err() {
            tracing::error!(topic, "event lost: the publisher has ended");
        }
    }

    /// Queues an event that may be lost: it is dropped while the queue is full, which means that containerd has been
    /// away for long.
    pub(crate) fn offer(&self, topic: &str, event: Any, timestamp: Timestamp) {
        if let Err(error) = self.queue.try_send(self.item(topic, event, timestamp)) {
            tracing::warn!(topic, error = %Chain(&error), "dropped an event: containerd accepts none");
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

    /// Waits until everything queued so far has been sent. Returns false if `deadline` passes first.
    pub(crate) async fn flush(&self, deadline: Duration) -> bool {
        let (done, flushed) = oneshot::channel();
        let flush = async { self.queue.send(Item::Flush(done)).await.is_ok() && flushed.await.is_ok() };
        tokio::time::timeout(deadline, flush).await.unwrap_or(false)
    }
}

#[cfg(test)]
impl Publisher {
    /// A publisher that keeps its events for a test.
    pub(crate) fn kept() -> (Self, Kept) {
        let (queue, items) = mpsc::channel(QUEUE);
        (Self { namespace: "test".to_owned(), queue, recent: Recent::default() }, Kept(items))
    }
}

/// The events of a test's publisher.
#[cfg(test)]
pub(crate) struct Kept(mpsc::Receiver<Item>);

#[cfg(test)]
impl Kept {
    /// The next event; `None` if there is none yet.
    pub(crate) fn take(&mut self) -> Option<Envelope> {
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
                // The receiver is gone after its deadline.
                let _ = done.send(());
            }
        }
    }
}

/// Sends an event, repeatedly until containerd accepts or rejects it.
async fn forward(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    let (mut pause, longest) = BACKOFF;
    loop {
        match attempt(address, client, &request).await {
            Ok(()) => return,
            // containerd received the event and rejected it; it would reject it again.
            Err(ttrpc::Error::RpcStatus(status)) => {
                tracing::error!(
                    topic = request.envelope.topic,
                    status = status.message,
                    "containerd rejected an event"
                );
                return;
            }
            Err(error) => {
                let topic = &request.envelope.topic;
                tracing::warn!(topic, error = %Chain(&error), "event not delivered yet; retrying");
                *client = None;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        }
    }
}

async fn attempt(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    if client.is_none() {
        *client = Some(EventsClient::new(Client::connect(address).await?));
    }
    if let Some(client) = client {
        client.forward(with_duration(ATTEMPT_TIMEOUT), request).await?;
    }
    Ok(())
}
