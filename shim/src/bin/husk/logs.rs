//! `husk logs`: prints the guest's logs from its shim, or from the files on disk if the shim does not answer.

use std::io::{self, Write};

use anyhow::Result;
use clap::ValueEnum;
use husk_protos::chain::Chain;
use husk_shim::console::lines::Lines;
use husk_shim::console::{INIT_LOG, LOG, LogChain};
use husk_shim::ctl::messages::{LogSource, LogsEnd, LogsParams, LogsPart};
use husk_shim::state::State;
use serde_json::json;

use crate::client::CallError;
use crate::find;
use crate::print::shown;

/// A log of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// The serial console: output of the guest's kernel
    Console,
    /// The log of the guest's init
    Init,
}

impl From<Source> for LogSource {
    fn from(source: Source) -> Self {
        match source {
            Source::Console => Self::Console,
            Source::Init => Self::Init,
        }
    }
}

/// What to print.
pub(crate) struct Options {
    pub(crate) source: Option<Source>,
    pub(crate) lines: Option<usize>,
    pub(crate) follow: bool,
    pub(crate) json: bool,
}

pub(crate) fn run(id: &str, options: &Options) -> Result<()> {
    let state = find::find(id)?;
    let params =
        LogsParams { source: options.source.map(LogSource::from), lines: options.lines, follow: options.follow };
    let (only, json) = (params.source, options.json);
    let mut page = Page { out: io::stdout().lock(), only, json, printed: false };
    let ended: Result<LogsEnd, CallError> = find::connect(&state)
        .and_then(|mut client| client.stream("compute.vm.logs", &params, |part: LogsPart| page.part(&part)));
    match ended {
        Ok(LogsEnd { ended: true }) if options.follow => writeln!(io::stderr(), "husk: the sandbox has ended")?,
        Ok(_) => {}
        Err(CallError::Closed) if page.printed => writeln!(io::stderr(), "husk: the sandbox's shim has ended")?,
        Err(error) if error.is_silence() && !page.printed => {
            let more = if options.follow { "; there will be no new lines" } else { "" };
            let why = shown(&Chain(&error).to_string());
            writeln!(io::stderr(), "husk: {why}; showing the files on disk{more}")?;
            page.disk(&state, options.lines)?;
        }
        Err(error) => return Err(error.into()),
    }
    if !page.printed {
        writeln!(io::stderr(), "husk: the guest has written nothing")?;
    }
    Ok(())
}

struct Page<W> {
    out: W,
    /// The only log that is printed. Without it, each line names its log.
    only: Option<LogSource>,
    json: bool,
    printed: bool,
}

impl<W: Write> Page<W> {
    /// Prints a notification.
    fn part(&mut self, part: &LogsPart) -> io::Result<()> {
        if let Some(missed) = part.missed {
            let log = part.source.name();
            writeln!(io::stderr(), "husk: {missed} bytes of the {log} log were lost: the output is read too slowly")?;
        }
        for line in &part.lines {
            self.line(part.source, line)?;
        }
        self.out.flush()
    }

    fn line(&mut self, source: LogSource, line: &str) -> io::Result<()> {
        self.printed = true;
        if self.json {
            writeln!(self.out, "{}", json!({"source": source, "line": line}))
        } else if self.only.is_some() {
            writeln!(self.out, "{}", shown(line))
        } else {
            writeln!(self.out, "{:<7} | {}", source.name(), shown(line))
        }
    }

    /// Prints the files that the shim has left.
    fn disk(&mut self, state: &State, last: Option<usize>) -> Result<()> {
        let only = self.only;
        for source in LogSource::ALL.into_iter().filter(|source| only.is_none_or(|only| only == *source)) {
            let file = match source {
                LogSource::Console => LOG,
                LogSource::Init => INIT_LOG,
            };
            let chain = LogChain::open(&state.dir().join(file))?;
            let mut offset = last.map_or(Ok(0), |lines| chain.last_lines(lines))?;
            let (mut lines, mut buffer) = (Lines::default(), vec![0; 64 * 1024]);
            loop {
                let read = chain.read_at(offset, &mut buffer)?;
                if read == 0 {
                    break;
                }
                offset += read as u64;
                for line in lines.take(&buffer[..read]) {
                    self.line(source, &line)?;
                }
            }
            if let Some(line) = lines.end() {
                self.line(source, &line)?;
            }
        }
        self.out.flush()?;
        Ok(())
    }
}
