//! `husk check-config`.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use husk_shim::config::load::ConfigError;
use husk_shim::prepare::host;
use husk_shim::prepare::host::Places;
use serde_json::json;

pub fn run(file: Option<&Path>, as_json: bool) -> Result<ExitCode> {
    let checked = host::check(file, &Places::of_process());
    if as_json {
        let (told, code) = match checked {
            Ok((path, there)) => {
                (json!({"ok": true, "file": path, "exists": there, "problems": []}), ExitCode::SUCCESS)
            }
            Err(ConfigError::Invalid { path, problems }) => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                (json!({"ok": false, "file": path, "exists": path.exists(), "problems": problems}), ExitCode::FAILURE)
            }
            Err(error) => return Err(error.into()),
        };
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&told)?)?;
        return Ok(code);
    }
    match checked {
        Ok((path, true)) => writeln!(io::stdout(), "ok: {}", path.display())?,
        Ok((path, false)) => writeln!(io::stdout(), "ok: no {}, everything is as by default", path.display())?,
        Err(ConfigError::Invalid { path, problems }) => {
            for problem in problems {
                writeln!(io::stderr(), "{}: {problem}", path.display())?;
            }
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}
