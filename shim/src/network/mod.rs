//! Connects a VM to the sandbox's network namespace, through rtnetlink(7) and without running `ip` or `tc`.
//!
//! containerd's CRI plugin, or whoever set up the namespace, leaves links there: a veth, a macvlan and so on. Each link
//! gets a tap device in the same namespace. Two `mirred` redirects (tc-mirred(8)) join the link and its tap: what
//! arrives at one leaves through the other, before the namespace's own stack sees it. QEMU inherits the tap's
//! descriptors, and the guest takes over the link's MAC, MTU, addresses, routes, rules and neighbours.
//!
//! A VM has spare NICs with taps of their own, which have no carrier. A link that appears after the boot gets a spare
//! NIC, and a NIC whose link disappears becomes spare again. If no NIC is left, [`Settled::waiting`] asks the caller to
//! plug one into the machine, if the machine's board can be given one.
//!
//! The caller does, in this order:
//!
//! 1. [`claim`] checks the namespace, or [`create`] makes one. The caller records the claim before anything changes in
//!    the namespace.
//! 2. [`connect`] makes the taps and the redirects, and returns the descriptors and the guest's configuration.
//! 3. [`Follower::settle`] follows the namespace's changes as long as the VM runs.
//! 4. [`disconnect`] removes what outlives QEMU. A tap and its qdisc vanish with the tap's last descriptor.
//!
//! | file              | content                                                                 |
//! |-------------------|-------------------------------------------------------------------------|
//! | `link.rs`         | a pod's link, and the names of taps                                     |
//! | `netns.rs`        | runs a closure on a thread of its own inside a network namespace        |
//! | `private.rs`      | creates a namespace for a sandbox whose spec names none                 |
//! | `multicast.rs`    | multicast groups that the guest joins                                   |
//! | `name_server.rs`  | whether docker's DNS server listens in the namespace                    |
//! | `netlink.rs`      | rtnetlink requests and dumps with a deadline                            |
//! | `reply.rs`        | the kernel's replies: acknowledgements, errors and their texts          |
//! | `subscription.rs` | the kernel's notifications about changes                                |
//! | `scan/`           | reads a namespace's configuration and converts it to husk's protocol    |
//! | `loopback/`       | redirects the namespace's own connections to the shim, for forwarding   |
//! | `tap.rs`          | tap devices                                                             |
//! | `redirect.rs`     | ingress qdiscs and filters                                              |
//! | `nic.rs`          | the NICs, and the links that wait for one                               |
//! | `diff.rs`         | which NICs change their links (pure)                                    |
//! | `follow.rs`       | keeps the NICs connected                                                |
//! | `plug.rs`         | NICs that are plugged into the running machine                          |
//! | `connect.rs`      | the beginning and the end                                               |
//! | `relocate.rs`     | moves the NICs of a VM that has waited to its sandbox's namespace       |
//! | `status.rs`       | what operators see                                                      |
//! | `error.rs`        | errors                                                                  |
//! | `user/`           | user-mode networking, which needs no namespace                          |

mod connect;
mod diff;
mod error;
mod follow;
mod link;
pub(crate) mod loopback;
mod multicast;
mod name_server;
mod netlink;
mod netns;
mod nic;
mod plug;
mod private;
mod redirect;
mod relocate;
mod reply;
mod scan;
mod status;
mod subscription;
mod tap;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod user;

pub use connect::{Connected, NicPlan, connect, disconnect};
pub use error::{NetworkError, ObjectError};
pub use follow::{Follower, Settled};
pub use netns::{Claim, claim};
pub use nic::Waiting;
pub use private::{PrivateNamespace, create};
pub use relocate::relocate;
pub use scan::copied_sysctls;
pub use status::{LinkStatus, NetworkStatus, NicStatus};
