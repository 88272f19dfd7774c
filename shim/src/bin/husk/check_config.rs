//! `husk check-config`.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use husk_shim::config::load::ConfigError;
use husk_shim::prepare::host;
use husk_shim::prepare::host::Places;
use serde_json::json;

use crate::print;

pub(crate) fn run(file: Option<&Path>, as_json: bool) -> Result<ExitCode> {
    let checked = host::check(file, &Places::of_process());
    let (path, exists, problems) = match checked {
        Ok((path, exists)) => (path, exists, Vec::new()),
        Err(ConfigError::Invalid { path, problems }) => {
            let exists = path.exists();
            (path, exists, problems.iter().map(ToString::to_string).collect())
        }
        Err(error) => return Err(error.into()),
    };
    let valid = problems.is_empty();
    if as_json {
        let report = json!({"ok": valid, "file": path, "exists": exists, "problems": problems});
        print::json(&mut io::stdout(), &report)?;
    } else if !valid {
        for problem in problems {
            writeln!(io::stderr(), "{}: {problem}", path.display())?;
        }
    } else if exists {
        writeln!(io::stdout(), "ok: {}", path.display())?;
    } else {
        writeln!(io::stdout(), "ok: {} does not exist, so all defaults apply", path.display())?;
    }
    Ok(if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
