//! The shim's log: one line of `key=value` pairs per event, in the fifo that containerd reads (`log` in the bundle).

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Target of the events that the guest's init logged.
const GUEST: &str = "guest";
/// Name of the field that holds other fields, already formatted.
const RAW: &str = "raw";

/// Opens containerd's fifo and installs it as this process's log. Each line names the sandbox and its namespace.
///
/// # Errors
/// When the fifo cannot be opened, or a log is already installed.
pub(crate) fn init(fifo: &Path, debug: bool, namespace: &str, sandbox: &str) -> io::Result<()> {
    // Read access as well: the open does not wait for containerd, and a restart of containerd causes no EPIPE.
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo)?;
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    tracing_subscriber::registry()
        // The guest filters its own events by the level in the configuration.
        .with(Targets::new().with_default(level).with_target(GUEST, LevelFilter::TRACE))
        .with(
            tracing_subscriber::fmt::layer()
                .event_format(KeyValue { namespace: namespace.to_owned(), sandbox: sandbox.to_owned() })
                .with_writer(Mutex::new(Fifo { file, dropped: 0 })),
        )
        .try_init()
        .map_err(io::Error::other)?;
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the shim panicked")));
    Ok(())
}

/// Logs an event of the guest's init. `fields` are formatted by [`push_field`].
pub(crate) fn guest(level: Level, message: &str, fields: &str) {
    match level {
        Level::ERROR => tracing::error!(target: GUEST, raw = fields, "{message}"),
        Level::WARN => tracing::warn!(target: GUEST, raw = fields, "{message}"),
        Level::INFO => tracing::info!(target: GUEST, raw = fields, "{message}"),
        Level::DEBUG => tracing::debug!(target: GUEST, raw = fields, "{message}"),
        Level::TRACE => tracing::trace!(target: GUEST, raw = fields, "{message}"),
    }
}

/// A full fifo drops lines and never blocks, because there may be no reader. The next line that fits is preceded by the
/// count.
struct Fifo {
    file: File,
    dropped: u64,
}

impl Write for Fifo {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.dropped > 0 {
            let notice =
                format!("level=warning msg=\"log lines were dropped: the fifo was full\" lines={}\n", self.dropped);
            if self.file.write_all(notice.as_bytes()).is_ok() {
                self.dropped = 0;
            }
        }
        if self.file.write_all(line).is_err() {
            self.dropped += 1;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct KeyValue {
    namespace: String,
    sandbox: String,
}

impl<S, N> FormatEvent<S, N> for KeyValue
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(writer, "level={level} msg={:?}", fields.message)?;
        if event.metadata().target() == GUEST {
            write!(writer, " from=guest")?;
        }
        write!(writer, " runtime=io.containerd.husk.v1 namespace={} sandbox={}", self.namespace, self.sandbox)?;
        writeln!(writer, "{}", fields.rest)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        if field.name() == "message" {
            self.message = value;
        } else {
            self.push(field.name(), &value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else if field.name() == RAW {
            self.rest.push_str(value);
        } else {
            self.push(field.name(), value);
        }
    }
}

impl Fields {
    fn push(&mut self, name: &str, value: &str) {
        push_field(&mut self.rest, name, value);
    }
}

/// Appends ` name=value`. Quotes values that a parser would otherwise split or misread.
pub(crate) fn push_field(to: &mut String, name: &str, value: &str) {
    let plain = !value.is_empty() && value.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '=' | '\\'));
    // Writing to a String cannot fail.
    let _ = if plain { write!(to, " {name}={value}") } else { write!(to, " {name}={value:?}") };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ambiguous_values_are_quoted() {
        let mut fields = Fields::default();
        for (name, value) in
            [("a", "plain/path-1"), ("b", "two words"), ("c", "x=\"y\""), ("d", ""), ("e", "line\nbreak")]
        {
            fields.push(name, value);
        }
        assert_eq!(fields.rest, " a=plain/path-1 b=\"two words\" c=\"x=\\\"y\\\"\" d=\"\" e=\"line\\nbreak\"");
    }
}
