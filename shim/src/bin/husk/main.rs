//! `husk`: the operator's look at the virtual machines of this host. It asks the shims through their sockets, and where one does not answer, it
//! reads what that has left on disk; containerd is not needed. Each command is in a file of its own.

mod check_config;
mod client;
mod find;
mod list;
mod logs;
mod print;
mod status;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Looks into husk's virtual machines.
#[derive(Parser)]
#[command(name = "husk", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Which sandbox.
#[derive(Args)]
struct Sandbox {
    /// The id of the sandbox or of one of its containers, or an unambiguous beginning of it; NAMESPACE/ID where two namespaces have it
    id: String,
}

/// How to tell it.
#[derive(Args)]
struct Format {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the sandboxes of this host
    List {
        #[command(flatten)]
        format: Format,
    },
    /// Shows all that is known of one sandbox: its VM with how it came to its state, its health, its supervisor, its containers
    Status {
        #[command(flatten)]
        sandbox: Sandbox,
        #[command(flatten)]
        format: Format,
    },
    /// Prints the guest's console and the log of its init
    Logs {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Only the last N lines of each
        #[arg(long, value_name = "N")]
        lines: Option<usize>,
        #[command(flatten)]
        format: Format,
    },
    /// Checks the configuration as the creation of a container does, and prints all that is wrong
    CheckConfig {
        /// The file; without it, the one that HUSK_CONFIG names, else /etc/husk/config.toml
        file: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // A reader such as `head` has enough.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Parts of it may be a guest's words.
            let _ = writeln!(io::stderr(), "husk: {}", print::shown_lines(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { format } => list::run(format.json)?,
        Command::Status { sandbox, format } => status::run(&sandbox.id, format.json)?,
        Command::Logs { sandbox, lines, format } => logs::run(&sandbox.id, lines, format.json)?,
        Command::CheckConfig { file, format } => return check_config::run(file.as_deref(), format.json),
    }
    Ok(ExitCode::SUCCESS)
}
