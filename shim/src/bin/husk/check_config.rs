//! `husk check-config`.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use husk_shim::config::load::ConfigError;
use husk_shim::prepare::boot_files::BootFile;
use husk_shim::prepare::host::{self, Checked, Places};
use serde_json::{Value, json};

use crate::print;

pub(crate) fn run(file: Option<&Path>, as_json: bool) -> Result<ExitCode> {
    let checked = host::check(file, &Places::of_process());
    let (Checked { path, exists, files, notes }, problems) = match checked {
        Ok(checked) => (checked, Vec::new()),
        Err(ConfigError::Invalid { path, problems }) => {
            let exists = path.exists();
            (
                Checked { path, exists, files: Vec::new(), notes: Vec::new() },
                problems.iter().map(ToString::to_string).collect(),
            )
        }
        Err(error) => return Err(error.into()),
    };
    let valid = problems.is_empty();
    if as_json {
        let digests: serde_json::Map<String, Value> = files.iter().map(described).collect();
        let report = json!({
            "ok": valid, "file": path, "exists": exists, "problems": problems, "notes": notes, "digests": digests,
        });
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
    if !as_json {
        for note in notes {
            writeln!(io::stdout(), "note: {note}")?;
        }
        // As they stand in the configuration file.
        for BootFile { key, path, sha256, verified } in files {
            let note = if verified { ", verified at each boot" } else { "" };
            writeln!(io::stdout(), "{key} = \"{sha256}\" # {}{note}", path.display())?;
        }
    }
    Ok(if valid { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn described(file: &BootFile) -> (String, Value) {
    let BootFile { key, path, sha256, verified } = file;
    ((*key).to_owned(), json!({"path": path, "sha256": sha256.to_string(), "verified": verified}))
}
