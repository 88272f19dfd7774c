//! The Events service of one connection.

use std::sync::Arc;

use async_trait::async_trait;
use husk_protos::events::{Event, SubscribeRequest};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use super::{Events, Next};
use crate::connection::Disconnect;
use crate::error::{CallError, FailureKind};

pub(crate) struct EventsService {
    pub(crate) events: Arc<Events>,
    /// Of the service's connection.
    pub(crate) disconnect: Disconnect,
}

#[async_trait]
impl husk_protos::events_ttrpc::Events for EventsService {
    async fn subscribe(
        &self,
        _: &TtrpcContext,
        request: SubscribeRequest,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut disconnect = self.disconnect.clone();
        let mut newest = self.events.newest();
        let mut after = request.after;
        loop {
            // Mark as seen before reading: an event in between would not end the wait below.
            newest.mark_unchanged();
            match self.events.next(after) {
                Next::Event(event) => {
                    // A slow subscriber holds no lock. If the ring overtakes it, the next event reports the gap.
                    stream.send(&event).await?;
                    after = event.sequence;
                }
                Next::Unknown => {
                    let what = format!("event {after} has not happened");
                    return Err(CallError::new(FailureKind::InvalidArgument, what).into());
                }
                Next::Nothing => tokio::select! {
                    changed = newest.changed() => {
                        if changed.is_err() {
                            return Ok(());
                        }
                    }
                    () = disconnect.wait() => return Ok(()),
                },
            }
        }
    }
}
