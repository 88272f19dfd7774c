//! What a VM's NICs are connected to, and the status of its network.

use husk_protos::chain::Chain;

use crate::guest::client::Guest;
use crate::guest::network::{self, Report};
use crate::network::NetworkStatus as Connections;
use crate::state::links::{self, NetworkStatus};

/// The network as the host has connected it and, if the guest answers, as the guest reports it. No guest: the VM is
/// dead.
pub(super) async fn status(connections: Option<&Connections>, guest: Option<&Guest>) -> NetworkStatus {
    let problem = |problem: String| Report { problem: Some(problem), ..Report::default() };
    let report = match guest {
        Some(guest) => network::report(guest)
            .await
            .unwrap_or_else(|error| problem(format!("the guest did not report its links: {}", Chain(&error)))),
        None => problem("the VM is dead".to_owned()),
    };
    let mut status = NetworkStatus::default();
    if let Some(connections) = connections {
        status.netns = Some(connections.netns.clone());
        status.problems.clone_from(&connections.problems);
    }
    status.links = links::join(connections.map_or(&[], |connections| &connections.nics), report.links);
    status.problems.extend(report.problem);
    status
}
