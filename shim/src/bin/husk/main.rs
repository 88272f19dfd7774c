//! `husk`: the operator's tool for the virtual machines of this host. It queries the shims through their sockets. If a
//! shim does not answer, it reads the state that the shim has left on disk. It does not use containerd.
//!
//! | file | content |
//! |---|---|
//! | `list`, `status`, `boot_profile`, `events`, `logs`, `console`, `exec`, `check_config`, `metadata`, `node`, `pool`, `layers` | a command |
//! | `manual` | the manual pages, for the package |
//! | `find` | selects a sandbox, and reads its status from the shim or from disk |
//! | `client` | calls the methods of a shim |
//! | `print` | text that is safe on a terminal, tables, JSON |
//! | `term` | raw mode, signals |

mod boot_profile;
mod check_config;
mod client;
mod console;
mod events;
mod exec;
mod find;
mod layers;
mod list;
mod logs;
mod manual;
mod metadata;
mod network;
mod node;
mod pool;
mod print;
mod status;
mod term;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use husk_protos::chain::Chain;

/// Inspects and debugs husk's virtual machines
///
/// husk runs the containers of each sandbox (a pod, or a single container) in a virtual machine. This command shows the
/// sandboxes of the host, even when containerd is down. Start with `husk list`. It needs root privileges.
#[derive(Parser)]
#[command(name = "husk", version, arg_required_else_help = true)]
#[command(after_help = "Environment:\n  \
    HUSK_CONFIG     the configuration file [default: /etc/husk/config.toml]\n  \
    HUSK_STATE_DIR  the folder with the state of the sandboxes [default: /run/husk]\n\n\
    Exit status: 0 on success, 1 on failure, 2 for invalid arguments. For `husk exec`, see `husk exec --help`.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The argument that selects a sandbox.
#[derive(Args)]
struct Sandbox {
    /// Id of the sandbox or of one of its containers, or an unambiguous prefix. If several namespaces have it:
    /// NAMESPACE/ID
    id: String,
}

#[derive(Args)]
struct Format {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the sandboxes of this host
    ///
    /// An asterisk after the state marks a sandbox whose shim is dead or does not answer. The row then shows the last
    /// state on disk.
    List {
        #[command(flatten)]
        format: Format,
    },
    /// Shows one sandbox: its VM, state changes, health, supervisor, containers and boot
    Status {
        #[command(flatten)]
        sandbox: Sandbox,
        #[command(flatten)]
        format: Format,
    },
    /// Prints the guest's console output and the log of its init
    Logs {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Print only the last N lines of each log [default: all]
        #[arg(long, value_name = "N")]
        lines: Option<usize>,
        /// Follow new output until the sandbox ends
        #[arg(short, long)]
        follow: bool,
        /// Print only this log [default: both]
        #[arg(long)]
        source: Option<logs::Source>,
        /// Print JSON, one object a line: {"source", "line"}
        #[arg(long)]
        json: bool,
    },
    /// Shows the latest events: VM state changes, container events, late heartbeats, the supervisor
    Events {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Follow new events until the sandbox ends
        #[arg(short, long)]
        follow: bool,
        /// Print JSON, one event a line
        #[arg(long)]
        json: bool,
    },
    /// Connects this terminal to the guest's console; type ~. at the start of a line to leave
    Console {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Print the path of the console's socket as JSON instead of connecting
        #[arg(long)]
        json: bool,
    },
    /// Runs a process in the VM itself, outside its containers; requires debug mode
    ///
    /// A sandbox is in debug mode if it was created with the annotation io.husk.debug=true, or with `debug = true` in
    /// husk's configuration.
    ///
    /// The process gets a terminal if both stdin and stdout are terminals, or with --tty. Otherwise its streams are
    /// pipes, and data passes through unchanged. When this command ends, the process and its children are killed.
    ///
    /// Exit status: that of the process, or 128 plus the number of the signal that killed it; 127 if the program does
    /// not exist, 126 if it cannot be executed, 125 if husk itself fails.
    Exec {
        #[command(flatten)]
        sandbox: Sandbox,
        #[command(flatten)]
        options: exec::Options,
    },
    /// Shows how long each step of a VM's boot took
    BootProfile {
        #[command(flatten)]
        sandbox: Sandbox,
        #[command(flatten)]
        format: Format,
    },
    /// Validates the configuration, as the creation of a container does, and reports every problem
    CheckConfig {
        /// Configuration file [default: $HUSK_CONFIG, or else /etc/husk/config.toml]
        file: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
    /// Lists the images of layers that VMs share, and why a layer has none
    ///
    /// husk makes them in the background for `rootfs = "erofs"`. The image that was used least recently goes first.
    Layers {
        #[command(flatten)]
        format: Format,
    },
    /// Prints a shell completion script
    ///
    /// Example for bash: husk completion bash >/etc/bash_completion.d/husk
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Manages the tokens that VMs obtain from the metadata service
    #[command(subcommand)]
    Metadata(metadata::Command),
    /// Installs husk on a Kubernetes node, or removes it
    #[command(subcommand)]
    Node(node::Command),
    /// Shows, fills and empties the pool of VMs that wait for a sandbox
    #[command(subcommand)]
    Pool(pool::Command),
    /// Prints a manual page in the format of man(7)
    ///
    /// Example: husk manual husk | man -l -
    #[command(hide = true)]
    Manual {
        /// The page
        page: manual::Page,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        // The reader of the output, such as `head`, has exited.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // The message may contain text from a guest. If stderr is closed, the exit status has to do.
            let _ = writeln!(io::stderr(), "husk: {}", print::shown_lines(&Chain(error.as_ref()).to_string()));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let output = match cause.downcast_ref::<client::CallError>() {
            Some(client::CallError::Output(error)) => Some(error),
            _ => cause.downcast_ref::<io::Error>(),
        };
        output.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { format } => list::run(format.json)?,
        Command::Status { sandbox, format } => status::run(&sandbox.id, format.json)?,
        Command::Logs { sandbox, lines, follow, source, json } => {
            logs::run(&sandbox.id, &logs::Options { source, lines, follow, json })?;
        }
        Command::Events { sandbox, follow, json } => events::run(&sandbox.id, follow, json)?,
        Command::Console { sandbox, json } => return console::run(&sandbox.id, json),
        Command::Exec { sandbox, options } => return Ok(exec::run(&sandbox.id, &options)),
        Command::BootProfile { sandbox, format } => boot_profile::run(&sandbox.id, format.json)?,
        Command::CheckConfig { file, format } => return check_config::run(file.as_deref(), format.json),
        Command::Layers { format } => layers::run(format.json)?,
        Command::Metadata(command) => metadata::run(command)?,
        Command::Node(command) => node::run(&command)?,
        Command::Pool(command) => pool::run(&command)?,
        Command::Manual { page } => io::stdout().write_all(manual::page(page, &mut Cli::command()).as_bytes())?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "husk", &mut script);
            io::stdout().write_all(&script)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent_and_all_have_help() {
        fn check(command: &clap::Command) {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} has no description");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{name}: {} has no description", argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        check(&command);
    }
}
