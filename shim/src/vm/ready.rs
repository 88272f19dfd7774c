//! The steps between a guest's hello and its first container. The guest has to answer them all before one deadline.

use std::sync::Arc;
use std::time::Duration;

use husk_protos::events::Event;
use husk_protos::system::Hello;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::error::BootError;
use super::follow::Following;
use super::network::Network;
use crate::guest::client::{Guest, Metering};
use crate::guest::clock;
use crate::guest::link::Link;
use crate::state::Boot;
use crate::state::facts::HostMilestone;
use crate::vmm::Machine;

/// A guest that is ready for containers.
pub(super) struct Ready {
    pub(super) guest: Arc<Guest>,
    pub(super) network: Option<Following>,
    pub(super) events: Metering<Event>,
}

/// Makes the guest of `machine` ready, which has sent its hello, within `limit`. Its network is followed until `dead` has
/// a value. On failure, nothing follows it any more: the caller can undo its connection.
pub(super) async fn ready(
    link: Link,
    hello: &Hello,
    network: Network,
    machine: Arc<dyn Machine>,
    limit: Duration,
    dead: watch::Receiver<Option<String>>,
    reached: &mut Boot,
) -> Result<Ready, BootError> {
    let deadline = Deadline::after(limit);
    let guest = deadline.keep("connect to its services", Guest::connect(link, hello, limit)).await?;
    let guest = Arc::new(guest);
    reached.reached(HostMilestone::GuestConnected);
    let network =
        deadline.keep("configure its network", network.follow(&guest, hello.holds_nics, machine, dead)).await?;
    let subscribed = async {
        deadline.keep("set its clock", clock::set(&guest, None)).await?;
        // Without its events the guest is unusable.
        deadline.keep("subscribe to its events", guest.events(0)).await
    };
    match subscribed.await {
        Ok(events) => {
            reached.reached(HostMilestone::EventsSubscribed);
            Ok(Ready { guest, network, events })
        }
        Err(error) => {
            if let Some(network) = &network {
                network.stop().await;
            }
            Err(error)
        }
    }
}

/// The deadline of several steps.
struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    fn after(limit: Duration) -> Self {
        Self { at: Instant::now() + limit, limit }
    }

    async fn keep<T, E>(&self, step: &'static str, work: impl Future<Output = Result<T, E>>) -> Result<T, BootError>
    where
        BootError: From<E>,
    {
        let late = BootError::Unanswered { step, limit: self.limit };
        Ok(timeout_at(self.at, work).await.map_err(|_| late)??)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::guest::client::GuestError;

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_delays_every_answer_has_one_deadline_for_all_of_them() {
        let limit = Duration::from_secs(60);
        let deadline = Deadline::after(limit);
        let start = Instant::now();
        let slow = || async {
            sleep(limit / 2 + Duration::from_secs(1)).await;
            Ok::<_, GuestError>(())
        };
        deadline.keep("first", slow()).await.unwrap();
        let error = deadline.keep("set its clock", slow()).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest was not ready 60000 ms after its hello: set its clock");
        assert_eq!(start.elapsed(), limit);
    }
}
