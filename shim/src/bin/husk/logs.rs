//! `husk logs`: from the shim, else from the files that it has left.

use std::io::{self, Write};

use anyhow::Result;
use clap::ValueEnum;
use husk_shim::console::lines::Lines;
use husk_shim::console::{INIT_LOG, LOG, LogChain};
use husk_shim::state::State;
use serde_json::{Value, json};

use crate::client::Problem;
use crate::find;
use crate::print::{field, shown};

/// Whose words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// What the guest's kernel and others write to the serial console
    Console,
    /// What the guest's init logs
    Init,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Console => "console",
            Self::Init => "init",
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Console => LOG,
            Self::Init => INIT_LOG,
        }
    }
}

/// What is wanted.
pub struct Wanted {
    pub source: Option<Source>,
    pub lines: Option<usize>,
    pub follow: bool,
    pub json: bool,
}

pub fn run(id: &str, wanted: &Wanted) -> Result<()> {
    let state = find::find(id)?;
    let mut page = Page { out: io::stdout().lock(), wanted, printed: false };
    let mut params = json!({"follow": wanted.follow});
    if let Some(source) = wanted.source {
        params["source"] = json!(source.name());
    }
    if let Some(lines) = wanted.lines {
        params["lines"] = json!(lines);
    }
    let told =
        find::connect(&state).and_then(|mut client| client.stream("compute.vm.logs", params, |part| page.part(&part)));
    match told {
        Ok(answer) if wanted.follow && answer["ended"] == true => {
            writeln!(io::stderr(), "husk: the sandbox has ended")?;
        }
        Ok(_) => {}
        Err(Problem::Closed) if page.printed => writeln!(io::stderr(), "husk: the sandbox's shim has ended")?,
        Err(problem) if problem.is_silence() && !page.printed => {
            let more = if wanted.follow { "; nothing more will come" } else { "" };
            writeln!(io::stderr(), "husk: {}; this is from the disk{more}", shown(&problem.to_string()))?;
            page.disk(&state)?;
        }
        Err(problem) => return Err(problem.into()),
    }
    if !page.printed {
        writeln!(io::stderr(), "husk: nothing has been written")?;
    }
    Ok(())
}

struct Page<'a, W> {
    out: W,
    wanted: &'a Wanted,
    printed: bool,
}

impl<W: Write> Page<'_, W> {
    /// A notification of the shim's.
    fn part(&mut self, part: &Value) -> io::Result<()> {
        let source = field(&part["source"]);
        if let Some(missed) = part["missed"].as_u64() {
            writeln!(io::stderr(), "husk: {missed} bytes of the {source} came faster than they were taken")?;
        }
        for line in part["lines"].as_array().into_iter().flatten() {
            self.line(&source, line.as_str().unwrap_or_default())?;
        }
        self.out.flush()
    }

    fn line(&mut self, source: &str, line: &str) -> io::Result<()> {
        self.printed = true;
        if self.wanted.json {
            writeln!(self.out, "{}", json!({"source": source, "line": line}))
        } else if self.wanted.source.is_some() {
            writeln!(self.out, "{}", shown(line))
        } else {
            writeln!(self.out, "{source:<7} | {}", shown(line))
        }
    }

    fn disk(&mut self, state: &State) -> Result<()> {
        let sources = [Source::Console, Source::Init];
        for source in sources.into_iter().filter(|source| self.wanted.source.is_none_or(|wanted| wanted == *source)) {
            let chain = LogChain::open(&state.dir().join(source.file()))?;
            let mut offset = self.wanted.lines.map_or(Ok(0), |lines| chain.last_lines(lines))?;
            let (mut lines, mut buffer) = (Lines::default(), vec![0; 64 * 1024]);
            loop {
                let read = chain.read_at(offset, &mut buffer)?;
                if read == 0 {
                    break;
                }
                offset += read as u64;
                for line in lines.take(&buffer[..read]) {
                    self.line(source.name(), &line)?;
                }
            }
            if let Some(line) = lines.end() {
                self.line(source.name(), &line)?;
            }
        }
        self.out.flush()?;
        Ok(())
    }
}
