//! The Network service: makes the guest's network match a request of the host, and reports it (`status`).
//!
//! A configuration is applied in three steps, of which only the last one changes anything:
//!
//! 1. `resolve` checks the request and finds the links that it names;
//! 2. `plan` compares it with the links and with the request before it, and lists the changes in an order in which each
//!    one finds what it depends on;
//! 3. `apply` makes them, over rtnetlink(7) (`netlink`, `message`).
//!
//! NICs without a link have no driver, and so no network device that containers would see (`driver`). `model` has the
//! types that the steps share. Bringing up the loopback is a step of the boot.

mod apply;
mod driver;
mod error;
mod message;
mod model;
mod netlink;
mod plan;
mod resolve;
mod service;
mod status;

#[cfg(test)]
mod kernel_tests;
#[cfg(test)]
mod testing;

pub(crate) use service::NetworkService;
