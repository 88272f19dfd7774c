//! `containerd-shim-husk-v1`: what containerd runs for the runtime `io.containerd.husk.v1`. The work is in the library.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use husk_protos::chain::Chain;
use protobuf::Message;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what `start` prints on stderr when it fails, and only then.
            let _ = writeln!(io::stderr(), "io.containerd.husk.v1: {}", Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&args).context("arguments")?;
    if flags.version {
        return writeln!(io::stdout(), "containerd-shim-husk-v1 {}", env!("CARGO_PKG_VERSION")).context("write stdout");
    }
    if flags.info {
        let info = containerd_shim::protos::types::introspection::RuntimeInfo {
            name: "io.containerd.husk.v1".to_owned(),
            ..Default::default()
        };
        return io::stdout().write_all(&info.write_to_bytes()?).context("write stdout");
    }
    match flags.action.as_str() {
        "start" => husk_shim::serve::start(&flags),
        "delete" => husk_shim::serve::delete(&flags),
        "" => husk_shim::serve::serve(&flags),
        other => bail!("unknown action {other:?}: containerd calls this program with `start` or `delete`"),
    }
}
