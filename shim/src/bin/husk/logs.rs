//! `husk logs`.

use std::fs;
use std::io::{self, Write};

use anyhow::{Context, Result};
use serde_json::json;

use crate::find;
use crate::print::shown;

pub fn run(id: &str, lines: Option<usize>, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let path = state.dir().join("console.log");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let skip = lines.map_or(0, |lines| all.len().saturating_sub(lines));
    let mut out = io::stdout().lock();
    for line in &all[skip..] {
        if as_json {
            writeln!(out, "{}", json!({"source": "console", "line": line}))?;
        } else {
            writeln!(out, "{}", shown(line))?;
        }
    }
    Ok(())
}
