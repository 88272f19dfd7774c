//! The shim's log: one line of `key=value` pairs per event, in the fifo that containerd reads (`log` in the bundle). A
//! shim that waits for a sandbox logs to a file of its own.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use husk_protos::lock::lock;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, reload};

/// Target of the events that the guest's init logged.
const GUEST: &str = "guest";
/// Name of the field that holds other fields, already formatted.
const RAW: &str = "raw";

/// Most bytes that a shim logs before it has a fifo.
const WAITING_MAX: u64 = 256 * 1024;

/// This process's log, whose destination can change.
pub(crate) struct Log {
    level: reload::Handle<Targets, Registry>,
    output: Arc<Mutex<Output>>,
}

impl Log {
    /// Opens containerd's fifo and installs it as this process's log. Each line names the sandbox and its namespace.
    ///
    /// # Errors
    /// When the fifo cannot be opened, or a log is already installed.
    pub(crate) fn init(fifo: &Path, debug: bool, namespace: &str, sandbox: &str) -> io::Result<Self> {
        Self::install(Output::new(open_fifo(fifo)?, u64::MAX, namespace, sandbox), debug)
    }

    /// Installs a file as the log of a process that has no sandbox yet.
    ///
    /// # Errors
    /// When the file cannot be opened, or a log is already installed.
    pub(crate) fn init_waiting(file: &Path, namespace: &str, sandbox: &str) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(file)?;
        Self::install(Output::new(file, WAITING_MAX, namespace, sandbox), false)
    }

    /// Continues in a sandbox's fifo.
    ///
    /// # Errors
    /// When the fifo cannot be opened.
    pub(crate) fn move_to(&self, fifo: &Path, debug: bool, namespace: &str, sandbox: &str) -> io::Result<()> {
        *lock(&self.output) = Output::new(open_fifo(fifo)?, u64::MAX, namespace, sandbox);
        self.level.reload(targets(debug)).map_err(io::Error::other)
    }

    fn install(output: Output, debug: bool) -> io::Result<Self> {
        let output = Arc::new(Mutex::new(output));
        let (level, handle) = reload::Layer::new(targets(debug));
        tracing_subscriber::registry().with(level).with(lines(output.clone())).try_init().map_err(io::Error::other)?;
        std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the shim panicked")));
        Ok(Self { level: handle, output })
    }
}

/// Writes the lines of a sandbox's log to `writer`.
pub(crate) fn subscriber(
    debug: bool,
    namespace: &str,
    sandbox: &str,
    writer: impl Write + Send + 'static,
) -> impl Subscriber + Send + Sync + 'static {
    let output = Output::new(writer, u64::MAX, namespace, sandbox);
    tracing_subscriber::registry().with(targets(debug)).with(lines(Arc::new(Mutex::new(output))))
}

fn lines<S: Subscriber + for<'a> LookupSpan<'a>>(output: Arc<Mutex<Output>>) -> impl Layer<S> {
    let name = output.clone();
    tracing_subscriber::fmt::layer().event_format(KeyValue(name)).with_writer(move || Writing(output.clone()))
}

fn open_fifo(fifo: &Path) -> io::Result<File> {
    // Read access as well: the open does not wait for containerd, and a restart of containerd causes no EPIPE.
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo)
}

fn targets(debug: bool) -> Targets {
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    // The guest filters its own events by the level in the configuration.
    Targets::new().with_default(level).with_target(GUEST, LevelFilter::TRACE)
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

/// Where lines go, and whom they name. A full fifo drops lines and never blocks, because there may be no reader. The next
/// line that fits is preceded by the count.
struct Output {
    writer: Box<dyn Write + Send>,
    /// Bytes that may follow.
    left: u64,
    dropped: u64,
    namespace: String,
    sandbox: String,
}

impl Output {
    fn new(writer: impl Write + Send + 'static, left: u64, namespace: &str, sandbox: &str) -> Self {
        Self {
            writer: Box::new(writer),
            left,
            dropped: 0,
            namespace: namespace.to_owned(),
            sandbox: sandbox.to_owned(),
        }
    }

    fn write(&mut self, line: &[u8]) {
        if self.dropped > 0 {
            let notice =
                format!("level=warning msg=\"log lines were dropped: the fifo was full\" lines={}\n", self.dropped);
            if self.append(notice.as_bytes()) {
                self.dropped = 0;
            }
        }
        if !self.append(line) {
            self.dropped += 1;
        }
    }

    fn append(&mut self, bytes: &[u8]) -> bool {
        let length = bytes.len() as u64;
        let written = self.left >= length && self.writer.write_all(bytes).is_ok();
        if written {
            self.left -= length;
        }
        written
    }
}

struct Writing(Arc<Mutex<Output>>);

impl Write for Writing {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct KeyValue(Arc<Mutex<Output>>);

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
        let (namespace, sandbox) = {
            let output = lock(&self.0);
            (output.namespace.clone(), output.sandbox.clone())
        };
        write!(writer, " runtime=io.containerd.husk.v1 namespace={namespace} sandbox={sandbox}")?;
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
