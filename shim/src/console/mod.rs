//! The guest's console and logs, and the output of the processes that run it: recorded in files and in memory. The
//! console is served on `console.sock`.
//!
//! | file            | content                                                               |
//! |-----------------|-----------------------------------------------------------------------|
//! | `guest_logs.rs` | all output of a guest                                                 |
//! | `serial.rs`     | the console: its machine's end, and its last lines for error messages |
//! | `clients.rs`    | serves the console to clients                                         |
//! | `endpoint.rs`   | describes where the console is served                                 |
//! | `helper_log.rs` | the output of a VM's processes on the host                            |
//! | `record.rs`     | recorded output that several readers follow                           |
//! | `chain.rs`      | reads a rotated log as one                                            |
//! | `rotate.rs`     | writes a log and rotates it                                           |
//! | `lines.rs`      | splits output into lines                                              |

mod chain;
mod clients;
pub mod endpoint;
mod guest_logs;
pub(crate) mod helper_log;
pub mod lines;
mod record;
mod rotate;
pub(crate) mod serial;

pub use chain::LogChain;
pub use guest_logs::{GuestLogs, INIT_LOG};
pub(crate) use helper_log::HelperLog;
pub use record::Record;
pub use serial::{Attached, Console, LOG, SOCKET};
