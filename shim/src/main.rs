//! `containerd-shim-husk-v1`: the program that containerd runs for the runtime `io.containerd.husk.v1`.
//!
//! This file selects the mode. `serve.rs` in the library contains the modes.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_protos::chain::Chain;
use husk_shim::containerd::flags::Flags;
use husk_shim::disks::layers;
use husk_shim::pool::launch;
use husk_shim::{serve, waiting};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd reports stderr to its client only if `start` fails.
            let _ = writeln!(io::stderr(), "io.containerd.husk.v1: {}", Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = Flags::parse(&args).context("parse the arguments")?;
    if flags.version {
        return writeln!(io::stdout(), "containerd-shim-husk-v1 {}", env!("CARGO_PKG_VERSION")).context("write stdout");
    }
    if flags.info {
        return serve::info();
    }
    match flags.action.as_str() {
        launch::FILL => waiting::fill(),
        launch::WAIT => waiting::wait(),
        layers::launch::ORDER => layers::launch::start().context("start the builder of layers"),
        layers::launch::BUILD => layers::builder::run(),
        "start" => serve::start(&flags),
        "delete" => serve::delete(&flags),
        "" => serve::serve(&flags),
        other => bail!("unknown action {other:?}: expected `start` or `delete`"),
    }
}
