//! The log: converts `tracing` events to lines and passes them to a sink. PID 1's lines go to the host; a worker
//! collects its own lines to explain an error.
//!
//! This replaces tracing-subscriber, whose formatter costs a hundred kilobytes of every guest's memory to build text
//! that the host would have to parse again.

use std::fmt::{self, Debug, Write as _};

use husk_protos::report::{LogField, LogLevel, LogLine};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::clock::boottime_ns;

/// Longest message or field value, bytes. A container may control the text.
const TEXT_MAX: usize = 2048;
/// Most fields of one line.
const FIELDS_MAX: usize = 16;

struct Log<S> {
    level: LevelFilter,
    sink: S,
}

/// Passes every event of this level, or of a more severe one, to `sink`. Call once per process.
pub(crate) fn start(level: LevelFilter, sink: impl Fn(LogLine) + Send + Sync + 'static) {
    // Fails only when a subscriber is already set; that one stays.
    let _ = tracing::subscriber::set_global_default(Log { level, sink });
}

/// Formats a line for people: `message key=value`.
pub(crate) fn text(line: &LogLine) -> String {
    let mut text = line.message.clone();
    for field in &line.fields {
        // Writing to a String cannot fail.
        let _ = write!(text, " {}={}", field.name, field.value);
    }
    text
}

/// Formats a line for the console, with its time in seconds since boot and its level.
pub(crate) fn console_line(line: &LogLine) -> String {
    let (seconds, micros) = (line.boottime_ns / 1_000_000_000, line.boottime_ns % 1_000_000_000 / 1000);
    let level = match line.level.enum_value_or_default() {
        LogLevel::LOG_LEVEL_ERROR => "error",
        LogLevel::LOG_LEVEL_WARN => "warn",
        LogLevel::LOG_LEVEL_INFO => "info",
        LogLevel::LOG_LEVEL_DEBUG => "debug",
        LogLevel::LOG_LEVEL_TRACE | LogLevel::LOG_LEVEL_UNSPECIFIED => "trace",
    };
    format!("husk: {seconds}.{micros:06} {level}: {}\n", text(line))
}

impl<S: Fn(LogLine) + Send + Sync + 'static> Subscriber for Log<S> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = LogLine {
            level: level(*event.metadata().level()).into(),
            boottime_ns: boottime_ns(),
            ..Default::default()
        };
        event.record(&mut Fields(&mut line));
        (self.sink)(line);
    }

    // Never called: spans are not enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn level(level: Level) -> LogLevel {
    match level {
        Level::ERROR => LogLevel::LOG_LEVEL_ERROR,
        Level::WARN => LogLevel::LOG_LEVEL_WARN,
        Level::INFO => LogLevel::LOG_LEVEL_INFO,
        Level::DEBUG => LogLevel::LOG_LEVEL_DEBUG,
        Level::TRACE => LogLevel::LOG_LEVEL_TRACE,
    }
}

struct Fields<'a>(&'a mut LogLine);

impl Fields<'_> {
    fn push(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let mut text = Bounded(String::new());
        // Fails when the text is truncated.
        let _ = text.write_fmt(value);
        if field.name() == "message" {
            self.0.message = text.0;
        } else if self.0.fields.len() < FIELDS_MAX {
            self.0.fields.push(LogField { name: field.name().into(), value: text.0, ..Default::default() });
        }
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.push(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, format_args!("{value}"));
    }
}

struct Bounded(String);

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = TEXT_MAX - self.0.len();
        let fits = &text[..text.floor_char_boundary(room)];
        self.0.push_str(fits);
        if fits.len() < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn logged(level: LevelFilter, work: impl FnOnce()) -> Vec<LogLine> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let lines = lines.clone();
            move |line| lines.lock().unwrap().push(line)
        };
        tracing::subscriber::with_default(Log { level, sink }, work);
        Arc::try_unwrap(lines).unwrap().into_inner().unwrap()
    }

    #[test]
    fn an_event_becomes_a_line_with_its_fields_in_order() {
        let lines = logged(LevelFilter::INFO, || {
            tracing::info_span!("span")
                .in_scope(|| tracing::warn!(pid = 7, name = "a b", path = ?"/x", "it is {}", "so"));
            tracing::debug!("not this");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].level, LogLevel::LOG_LEVEL_WARN.into());
        assert_eq!(text(&lines[0]), "it is so pid=7 name=a b path=\"/x\"");
    }

    #[test]
    fn long_messages_and_values_are_truncated() {
        let lines =
            logged(LevelFilter::INFO, || tracing::info!(long = "é".repeat(TEXT_MAX), "{}", "x".repeat(TEXT_MAX + 1)));
        assert_eq!((lines[0].message.len(), lines[0].fields[0].value.len()), (TEXT_MAX, TEXT_MAX));
    }

    #[test]
    fn a_console_line_shows_time_and_level() {
        let line = LogLine {
            level: LogLevel::LOG_LEVEL_ERROR.into(),
            message: "gone".into(),
            boottime_ns: 1_002_003_000,
            ..Default::default()
        };
        assert_eq!(console_line(&line), "husk: 1.002003 error: gone\n");
    }
}
