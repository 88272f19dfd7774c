//! `husk metadata`: the host's side of the tokens that VMs obtain from the metadata service.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Subcommand;
use husk_shim::config::load;
use husk_shim::metadata::host::serve_all;
use husk_shim::metadata::key::Key;
use husk_shim::state::base;
use tokio::signal::unix::{SignalKind, signal};
use tracing::Level;

/// The subcommands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Prints the public key that verifies this host's tokens; creates the key if there is none
    ///
    /// VMs obtain their tokens (JWT, EdDSA) from the service husk.v1.Metadata on vsock port 1027 of the host (CID 2).
    /// The token's header identifies the key by `kid`, its thumbprint (RFC 7638). The private key is in the file that
    /// `metadata_key` in husk's configuration names, by default /etc/husk/metadata.key.
    PublicKey {
        /// Print a JSON Web Key (RFC 8037) instead of PEM
        #[arg(long)]
        json: bool,
    },
    /// Serves the metadata service to all VMs that use the kernel's vsock, until SIGTERM or SIGINT
    ///
    /// Needed only with `vsock = "vhost"` in the configuration; otherwise each VM's shim serves its own VM. Listens on
    /// vsock port 1027, which only one process of a host can do. Identifies a caller by its CID, and looks up the VM
    /// with that CID in the shims' state on disk. Logs to stderr.
    Serve {
        /// Also log each connection that is closed or rejected
        #[arg(long)]
        debug: bool,
    },
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::PublicKey { json } => public_key(json),
        Command::Serve { debug } => serve(debug),
    }
}

fn public_key(json: bool) -> Result<()> {
    let public = Key::read_or_create(&load::load()?.tokens.key)?.public();
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&public.jwk())?)?;
    } else {
        write!(out, "{}", public.pem().context("encode the public key")?)?;
    }
    Ok(())
}

fn serve(debug: bool) -> Result<()> {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let log = tracing_subscriber::fmt().with_max_level(level).with_target(false).with_writer(io::stderr);
    // The systemd journal adds the time.
    log.without_time().with_ansi(io::stderr().is_terminal()).init();
    let tokens = load::load()?.tokens;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let served = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("catch SIGINT")?;
        tokio::select! {
            served = serve_all(base(), tokens) => served.context("answer on the kernel's vsock"),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    });
    // Does not wait for threads that are blocked by a slow disk.
    runtime.shutdown_background();
    served
}
