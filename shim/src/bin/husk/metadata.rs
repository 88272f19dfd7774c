//! `husk metadata`: what is to be known outside of a VM about the tokens that it gets.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::Subcommand;
use husk_shim::config;
use husk_shim::metadata::key::Key;

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
}

/// Does it.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::PublicKey { json } => public_key(json),
    }
}

fn public_key(json: bool) -> Result<()> {
    let public = Key::read_or_make(&config::load()?.tokens.key)?.public();
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&public.jwk())?)?;
    } else {
        write!(out, "{}", public.pem().context("encode the public key")?)?;
    }
    Ok(())
}
