//! Counts open connections, so that a server can stay until its clients have closed them.

use tokio::sync::watch;

/// The open connections of a server. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Connections(watch::Sender<usize>);

/// A connection, while it is open.
#[derive(Debug)]
pub struct Open(Connections);

impl Connections {
    /// Counts a connection until the returned value is dropped.
    pub fn open(&self) -> Open {
        self.0.send_modify(|open| *open += 1);
        Open(self.clone())
    }

    /// Waits until all connections are closed.
    pub async fn closed(&self) {
        // Cannot fail: `self` holds the sender.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.send_modify(|open| *open -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_last_connection_to_close_ends_the_wait_for_all() {
        let connections = Connections::default();
        connections.closed().await;
        let (first, second) = (connections.open(), connections.open());
        drop(first);
        assert!(timeout(Duration::ZERO, connections.closed()).await.is_err(), "a connection is still open");
        drop(second);
        connections.closed().await;
    }
}
