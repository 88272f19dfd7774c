//! `husk`: the operator's look at the virtual machines of this host. It asks the shims through their sockets, and where one does not answer, it
//! reads what that has left on disk; containerd is not needed. Each command is in a file of its own.

mod boot_profile;
mod check_config;
mod client;
mod console;
mod events;
mod exec;
mod find;
mod list;
mod logs;
mod metadata;
mod print;
mod status;
mod term;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

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
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// Only those of one of them
        #[arg(long)]
        source: Option<logs::Source>,
        #[command(flatten)]
        format: Format,
    },
    /// Tells what has happened to a sandbox lately
    Events {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Go on with what happens
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Puts the guest's console on this terminal; ~. at the beginning of a line leaves it
    Console {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Print where it is served, in place of going there
        #[arg(long)]
        json: bool,
    },
    /// Runs a process in the VM itself, beside its containers; only in debug mode
    ///
    /// In debug mode are sandboxes that were created with the annotation io.husk.debug=true, or with `debug = true` in husk's configuration.
    ///
    /// The process has a terminal if stdin and stdout are one, or with --tty; else its streams are pipes, and what goes through them is not
    /// changed. It ends when this command does, and takes along what it has started.
    ///
    /// Exit status: the process's own, 128 plus the number of the signal that killed it; 127 if there is no such program, 126 if it cannot be
    /// executed, 125 if husk itself has failed.
    Exec {
        #[command(flatten)]
        sandbox: Sandbox,
        #[command(flatten)]
        wanted: exec::Wanted,
    },
    /// Shows where the time of a VM's boot went
    BootProfile {
        #[command(flatten)]
        sandbox: Sandbox,
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
    /// Prints what makes a shell complete husk's commands; bash: `husk completion bash >/etc/bash_completion.d/husk`
    Completion {
        /// The shell
        shell: Shell,
    },
    /// What is to be known about the tokens that VMs get of the metadata service
    #[command(subcommand)]
    Metadata(metadata::Command),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // A reader such as `head` has enough.
        Err(error) if has_enough(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Parts of it may be a guest's words.
            let _ = writeln!(io::stderr(), "husk: {}", print::shown_lines(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn has_enough(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let taker = match cause.downcast_ref::<client::Problem>() {
            Some(client::Problem::Taker(error)) => Some(error),
            _ => cause.downcast_ref::<io::Error>(),
        };
        taker.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { format } => list::run(format.json)?,
        Command::Status { sandbox, format } => status::run(&sandbox.id, format.json)?,
        Command::Logs { sandbox, lines, follow, source, format } => {
            logs::run(&sandbox.id, &logs::Wanted { source, lines, follow, json: format.json })?;
        }
        Command::Events { sandbox, follow, format } => events::run(&sandbox.id, follow, format.json)?,
        Command::Console { sandbox, json } => return console::run(&sandbox.id, json),
        Command::Exec { sandbox, wanted } => return Ok(exec::run(&sandbox.id, &wanted)),
        Command::BootProfile { sandbox, format } => boot_profile::run(&sandbox.id, format.json)?,
        Command::CheckConfig { file, format } => return check_config::run(file.as_deref(), format.json),
        Command::Metadata(command) => metadata::run(command)?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "husk", &mut script);
            io::stdout().write_all(&script)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
