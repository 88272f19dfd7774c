//! The `husk.*` words of the kernel command line. Parsing is pure; nothing here acts on what it finds.

use std::time::Duration;

use husk_protos::PORT_READY;
use tracing::level_filters::LevelFilter;

/// What the kernel command line asks of the init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cmdline {
    /// `husk.log=`: least severe level of the log that the host is told. Default `warn`.
    pub log: LevelFilter,
    /// `husk.hostname=`: the guest's own host name. Default `husk`.
    pub hostname: String,
    /// `husk.epoch_ns=`: host's wall clock at the guest's start, nanoseconds since 1970. A microvm may have no clock of its own.
    pub epoch_ns: Option<u64>,
    /// `husk.ready_port=`: the host's port on which it waits for this guest. Default 1026.
    pub ready_port: u32,
    /// `husk.heartbeat_ms=`: how often the host is told that the init still turns; never by default.
    pub heartbeat: Option<Duration>,
    /// `husk.debug=1`: the guest is one to look into, and the log is on the console too. See [`crate::debug`].
    pub debug: bool,
    /// `husk.extras=`: serial of the disk with files for the guest itself. None by default.
    pub extras: Option<String>,
    /// `husk.supervisor=1`: the supervisor agent is run, which the extras bring.
    pub supervisor: bool,
    /// Words of ours that mean nothing, and why: to be logged, because nobody else will ever tell the host.
    pub problems: Vec<String>,
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

/// Longest host name that the kernel takes (`__NEW_UTS_LEN`).
const HOSTNAME_MAX: usize = 64;

/// Reads `/proc/cmdline`'s text. Words that are not `husk.*` belong to somebody else; of a repeated word the last counts.
pub fn parse(text: &str) -> Cmdline {
    let mut cmdline = Cmdline::default();
    for word in text.split_ascii_whitespace().filter(|word| word.starts_with("husk.")) {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let understood = match key {
            "husk.log" => value.parse().map(|level| cmdline.log = level).is_ok(),
            "husk.hostname" => is_hostname(value).then(|| cmdline.hostname = value.to_owned()).is_some(),
            "husk.epoch_ns" => value.parse().map(|ns| cmdline.epoch_ns = Some(ns)).is_ok(),
            "husk.ready_port" => value.parse().map(|port| cmdline.ready_port = port).is_ok(),
            "husk.heartbeat_ms" => {
                let period = value.parse().ok().filter(|ms| *ms > 0).map(Duration::from_millis);
                period.map(|period| cmdline.heartbeat = Some(period)).is_some()
            }
            "husk.debug" => set_flag(&mut cmdline.debug, value),
            "husk.extras" => is_serial(value).then(|| cmdline.extras = Some(value.to_owned())).is_some(),
            "husk.supervisor" => set_flag(&mut cmdline.supervisor, value),
            _ => {
                cmdline.problems.push(format!("unknown kernel parameter {key}"));
                continue;
            }
        };
        if !understood {
            cmdline.problems.push(format!("kernel parameter {key} has the bad value {value:?}"));
        }
    }
    cmdline
}

fn set_flag(flag: &mut bool, value: &str) -> bool {
    let understood = ["0", "1"].contains(&value);
    *flag = if understood { value == "1" } else { *flag };
    understood
}

/// Longest serial of a virtio block device (`VIRTIO_BLK_ID_BYTES`).
const SERIAL_MAX: usize = 20;

fn is_serial(serial: &str) -> bool {
    (1..=SERIAL_MAX).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic())
}

fn is_hostname(name: &str) -> bool {
    (1..=HOSTNAME_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_or_named() {
        let default = Cmdline::default;
        let bad = |problem: &str| Cmdline { problems: vec![problem.into()], ..default() };
        let cases = [
            ("", default()),
            ("console=ttyS0 reboot=t panic=-1 ro\n", default()),
            ("husk.log=debug", Cmdline { log: LevelFilter::DEBUG, ..default() }),
            ("husk.log=off quiet", Cmdline { log: LevelFilter::OFF, ..default() }),
            ("husk.log=debug husk.log=info", Cmdline { log: LevelFilter::INFO, ..default() }),
            ("husk.log=loud", bad("kernel parameter husk.log has the bad value \"loud\"")),
            ("husk.hostname=pod-1.example", Cmdline { hostname: "pod-1.example".into(), ..default() }),
            ("husk.hostname=", bad("kernel parameter husk.hostname has the bad value \"\"")),
            ("husk.hostname=a/b", bad("kernel parameter husk.hostname has the bad value \"a/b\"")),
            ("husk.epoch_ns=1763000000000000000", Cmdline { epoch_ns: Some(1_763_000_000_000_000_000), ..default() }),
            ("husk.epoch_ns=-1", bad("kernel parameter husk.epoch_ns has the bad value \"-1\"")),
            ("husk.ready_port=65540", Cmdline { ready_port: 65540, ..default() }),
            ("husk.ready_port=-1", bad("kernel parameter husk.ready_port has the bad value \"-1\"")),
            ("husk.heartbeat_ms=250", Cmdline { heartbeat: Some(Duration::from_millis(250)), ..default() }),
            ("husk.heartbeat_ms=0", bad("kernel parameter husk.heartbeat_ms has the bad value \"0\"")),
            ("husk.debug=1", Cmdline { debug: true, ..default() }),
            ("husk.debug=1 husk.debug=0", default()),
            ("husk.debug=yes", bad("kernel parameter husk.debug has the bad value \"yes\"")),
            (
                "husk.debug=1 husk.debug",
                Cmdline { debug: true, ..bad("kernel parameter husk.debug has the bad value \"\"") },
            ),
            ("husk.extras=husk-extras", Cmdline { extras: Some("husk-extras".into()), ..default() }),
            ("husk.extras=", bad("kernel parameter husk.extras has the bad value \"\"")),
            (
                "husk.extras=a-serial-of-21-bytes.",
                bad("kernel parameter husk.extras has the bad value \"a-serial-of-21-bytes.\""),
            ),
            ("husk.supervisor=1", Cmdline { supervisor: true, ..default() }),
            ("husk.supervisor=1 husk.supervisor=0", default()),
            ("husk.supervisor=true", bad("kernel parameter husk.supervisor has the bad value \"true\"")),
            ("husk.colour=red", bad("unknown kernel parameter husk.colour")),
            ("husk.colour", bad("unknown kernel parameter husk.colour")),
            ("nothusk.log=off", default()),
        ];
        for (text, want) in cases {
            assert_eq!(parse(text), want, "{text:?}");
        }
    }
}
