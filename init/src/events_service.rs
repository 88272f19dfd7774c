//! The Events service of one connection.

use std::sync::Arc;

use async_trait::async_trait;
use husk_protos::events::{Event, SubscribeRequest};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::error::{Error, Kind};
use crate::events::{Events, Next};
use crate::serve::Gone;

/// Events for one connection.
pub struct Service {
    /// The ring.
    pub events: Arc<Events>,
    /// Of this connection.
    pub gone: Gone,
}

#[async_trait]
impl husk_protos::events_ttrpc::Events for Service {
    async fn subscribe(
        &self,
        _: &TtrpcContext,
        request: SubscribeRequest,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut gone = self.gone.clone();
        let mut newest = self.events.newest();
        let mut after = request.after;
        loop {
            // Marked as seen before the look, so that an event in between ends the wait below.
            newest.mark_unchanged();
            match self.events.next(after) {
                Next::Event(event) => {
                    // As slow as the subscriber: it holds no lock, and what it misses of the ring it is told.
                    stream.send(&event).await?;
                    after = event.sequence;
                }
                Next::Unknown => {
                    let what = format!("event {after} has not happened");
                    return Err(Error::new(Kind::InvalidArgument, what).into());
                }
                Next::Nothing => tokio::select! {
                    changed = newest.changed() => {
                        if changed.is_err() {
                            return Ok(());
                        }
                    }
                    () = gone.wait() => return Ok(()),
                },
            }
        }
    }
}
