//! `husk metadata`: what is to be known outside of a VM about the tokens that it gets.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Subcommand;
use husk_shim::config::load;
use husk_shim::metadata::host::serve_all;
use husk_shim::metadata::key::Key;
use husk_shim::state::base;
use tokio::signal::unix::{SignalKind, signal};
use tracing::Level;

/// What there is to do.
#[derive(Subcommand)]
pub enum Command {
    /// Prints the key that verifies this host's tokens, which is made if there is none yet
    ///
    /// VMs get their tokens (JWT, EdDSA) from the service husk.v1.Metadata, on port 1027 of the host (CID 2). Their header names the key by `kid`,
    /// its thumbprint (RFC 7638). The private half is in the file that `metadata_key` of husk's configuration names, else /etc/husk/metadata.key.
    PublicKey {
        /// Print a JSON Web Key (RFC 8037) in place of PEM
        #[arg(long)]
        json: bool,
    },
    /// Answers all VMs of this host whose connections the kernel's vsock carries, until it is told to end
    ///
    /// For hosts whose configuration says vsock = "vhost"; elsewhere each VM's shim answers for it, and nothing needs to be started. Listens on vsock
    /// port 1027, which one process of a machine can do. A caller is known by the CID that it calls from, and which VM has that, by what the shims
    /// keep on disk. Logs to its standard error.
    Serve {
        /// Also log each connection that was closed or refused
        #[arg(long)]
        debug: bool,
    },
}

/// Does it.
pub fn run(command: Command) -> Result<()> {
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
    // A journal has its own clock.
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
    // Nothing that still hangs on a disk may keep the process.
    runtime.shutdown_background();
    served
}
