//! Parses the init's parameters (`husk.*`) on the kernel command line. Pure: nothing here acts on them.

use std::time::Duration;

use husk_protos::{PORT_READY, param};
use tracing::level_filters::LevelFilter;

/// The init's settings from the kernel command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cmdline {
    /// [`param::LOG`]: least severe level that the init logs to the host. Default `warn`.
    pub(crate) log: LevelFilter,
    /// [`param::HOSTNAME`]: the guest's host name. Default `husk`.
    pub(crate) hostname: String,
    /// [`param::EPOCH_NS`]: the host's wall clock when the guest started, nanoseconds since 1970. A microvm may have no
    /// RTC.
    pub(crate) epoch_ns: Option<u64>,
    /// [`param::READY_PORT`]: the host port that expects this guest's Hello. Default 1026.
    pub(crate) ready_port: u32,
    /// [`param::HEARTBEAT_MS`]: interval between heartbeats. None by default.
    pub(crate) heartbeat: Option<Duration>,
    /// [`param::DEBUG`]: enables debug mode ([`crate::debug`]) and copies the log to the console.
    pub(crate) debug: bool,
    /// [`param::EXTRAS`]: serial of the extras disk. None by default.
    pub(crate) extras: Option<String>,
    /// [`param::SUPERVISOR`]: runs the supervisor agent, which is one of the extras.
    pub(crate) supervisor: bool,
    /// Unknown parameters and invalid values. The caller logs them: the host has no other way to learn of them.
    pub(crate) problems: Vec<String>,
}

impl Default for Cmdline {
    fn default() -> Self {
        Self {
            log: LevelFilter::WARN,
            hostname: "husk".into(),
            epoch_ns: None,
            ready_port: PORT_READY,
            heartbeat: None,
            debug: false,
            extras: None,
            supervisor: false,
            problems: Vec::new(),
        }
    }
}

/// Parses the content of `/proc/cmdline`. Parameters without the prefix `husk.` are ignored; the last of a repeated
/// parameter applies.
pub(super) fn parse(text: &str) -> Cmdline {
    let mut cmdline = Cmdline::default();
    for word in text.split_ascii_whitespace().filter(|word| word.starts_with(param::PREFIX)) {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let valid = match key {
            param::LOG => value.parse().map(|level| cmdline.log = level).is_ok(),
            param::HOSTNAME => param::is_hostname(value).then(|| cmdline.hostname = value.to_owned()).is_some(),
            param::EPOCH_NS => value.parse().map(|ns| cmdline.epoch_ns = Some(ns)).is_ok(),
            param::READY_PORT => value.parse().map(|port| cmdline.ready_port = port).is_ok(),
            param::HEARTBEAT_MS => {
                let period = value.parse().ok().filter(|ms| *ms > 0).map(Duration::from_millis);
                period.map(|period| cmdline.heartbeat = Some(period)).is_some()
            }
            param::DEBUG => set_flag(&mut cmdline.debug, value),
            param::EXTRAS => is_serial(value).then(|| cmdline.extras = Some(value.to_owned())).is_some(),
            param::SUPERVISOR => set_flag(&mut cmdline.supervisor, value),
            _ => {
                cmdline.problems.push(format!("unknown kernel parameter {key}"));
                continue;
            }
        };
        if !valid {
            cmdline.problems.push(format!("kernel parameter {key} has the invalid value {value:?}"));
        }
    }
    cmdline
}

fn set_flag(flag: &mut bool, value: &str) -> bool {
    let valid = ["0", "1"].contains(&value);
    if valid {
        *flag = value == "1";
    }
    valid
}

/// Longest serial of a virtio block device (`VIRTIO_BLK_ID_BYTES`), bytes.
const SERIAL_MAX: usize = 20;

fn is_serial(serial: &str) -> bool {
    (1..=SERIAL_MAX).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_applied_or_reported_as_problems() {
        let default = Cmdline::default;
        let bad = |problem: &str| Cmdline { problems: vec![problem.into()], ..default() };
        let cases = [
            ("", default()),
            ("console=ttyS0 reboot=t panic=-1 ro\n", default()),
            ("husk.log=debug", Cmdline { log: LevelFilter::DEBUG, ..default() }),
            ("husk.log=off quiet", Cmdline { log: LevelFilter::OFF, ..default() }),
            ("husk.log=debug husk.log=info", Cmdline { log: LevelFilter::INFO, ..default() }),
            ("husk.log=loud", bad("kernel parameter husk.log has the invalid value \"loud\"")),
            ("husk.hostname=pod-1.example", Cmdline { hostname: "pod-1.example".into(), ..default() }),
            ("husk.hostname=", bad("kernel parameter husk.hostname has the invalid value \"\"")),
            ("husk.hostname=a/b", bad("kernel parameter husk.hostname has the invalid value \"a/b\"")),
            ("husk.epoch_ns=1763000000000000000", Cmdline { epoch_ns: Some(1_763_000_000_000_000_000), ..default() }),
            ("husk.epoch_ns=-1", bad("kernel parameter husk.epoch_ns has the invalid value \"-1\"")),
            ("husk.ready_port=65540", Cmdline { ready_port: 65540, ..default() }),
            ("husk.ready_port=-1", bad("kernel parameter husk.ready_port has the invalid value \"-1\"")),
            ("husk.heartbeat_ms=250", Cmdline { heartbeat: Some(Duration::from_millis(250)), ..default() }),
            ("husk.heartbeat_ms=0", bad("kernel parameter husk.heartbeat_ms has the invalid value \"0\"")),
            ("husk.debug=1", Cmdline { debug: true, ..default() }),
            ("husk.debug=1 husk.debug=0", default()),
            ("husk.debug=yes", bad("kernel parameter husk.debug has the invalid value \"yes\"")),
            (
                "husk.debug=1 husk.debug",
                Cmdline { debug: true, ..bad("kernel parameter husk.debug has the invalid value \"\"") },
            ),
            ("husk.extras=husk-extras", Cmdline { extras: Some("husk-extras".into()), ..default() }),
            ("husk.extras=", bad("kernel parameter husk.extras has the invalid value \"\"")),
            (
                "husk.extras=a-serial-of-21-bytes.",
                bad("kernel parameter husk.extras has the invalid value \"a-serial-of-21-bytes.\""),
            ),
            ("husk.supervisor=1", Cmdline { supervisor: true, ..default() }),
            ("husk.supervisor=1 husk.supervisor=0", default()),
            ("husk.supervisor=true", bad("kernel parameter husk.supervisor has the invalid value \"true\"")),
            ("husk.colour=red", bad("unknown kernel parameter husk.colour")),
            ("husk.colour", bad("unknown kernel parameter husk.colour")),
            ("nothusk.log=off", default()),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }
}
