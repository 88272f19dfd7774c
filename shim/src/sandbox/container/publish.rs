//! Publishes a container's events to containerd, encoded as the messages that containerd's clients decode.

use husk_protos::chain::Chain;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageDyn, MessageFull};

use crate::containerd::publisher::Publisher;

/// Queues an event; waits while the queue is full.
pub(super) async fn publish(publisher: &Publisher, topic: &str, event: &impl MessageFull, at: Timestamp) {
    if let Some(event) = encode(topic, event) {
        publisher.publish(topic, event, at).await;
    }
}

/// Queues an event, or drops it if the queue is full.
pub(super) fn offer(publisher: &Publisher, topic: &str, event: &impl MessageFull, at: Timestamp) {
    if let Some(event) = encode(topic, event) {
        publisher.offer(topic, event, at);
    }
}

fn encode(topic: &str, event: &impl MessageFull) -> Option<Any> {
    let encoded = event.write_to_bytes();
    let value = encoded.inspect_err(|error| tracing::error!(topic, error = %Chain(error), "failed to encode an event"));
    let type_url = event.descriptor_dyn().full_name().to_owned();
    Some(Any { type_url, value: value.ok()?, ..Default::default() })
}
