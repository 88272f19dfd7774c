//! The log: one line an event on the console, `key=value` after the message, by the level of `husk.log`.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::{self, time};

/// Starts logging to stderr, which is the console. Called once.
pub fn start(level: LevelFilter) {
    let subscriber = fmt::Subscriber::builder()
        .with_max_level(level)
        .with_timer(time::uptime())
        .with_ansi(false)
        .with_target(false)
        .with_writer(std::io::stderr)
        .finish();
    // Only fails when a subscriber is there already, which then goes on logging.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
