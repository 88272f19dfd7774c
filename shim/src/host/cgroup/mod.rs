//! cgroups of the host, whatever their version: which are husk's, who uses them, what limits they carry, and their
//! removal.
//!
//! | file        | content                                                        |
//! |-------------|----------------------------------------------------------------|
//! | `marks.rs`  | extended attributes that mark husk's cgroups and their users   |
//! | `limits.rs` | limits of memory, CPU time and processes                       |
//! | `users.rs`  | sandboxes that share a cgroup                                  |
//! | `remove.rs` | kills what a cgroup contains, and removes it                   |
//! | `home.rs`   | the cgroup that this process was started in                    |

pub(crate) mod home;
mod limits;
mod marks;
mod remove;
mod users;

pub(crate) use limits::{LimitError, Limits, enable_controller, write_value};
pub(crate) use marks::{User, is_marked, mark};
pub(crate) use users::{enter, leave, limit};
