//! `husk status`.

use std::io::{self, Write};

use anyhow::Result;
use husk_shim::status;

use crate::find;
use crate::list::source;
use crate::print::shown;

pub fn run(id: &str, as_json: bool) -> Result<()> {
    let state = find::find(id)?;
    let known = find::known(&state, "compute.vm.status", status::of);
    let mut told = known.status.clone();
    told["source"] = source(&known);
    if let (Some(why), false) = (&known.silent, as_json) {
        writeln!(io::stderr(), "husk: {}; this is from the disk, the last that it wrote", shown(why))?;
    }
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&told)?)?;
    Ok(())
}
