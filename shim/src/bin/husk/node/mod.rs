//! `husk node`: installs husk on a Kubernetes node, and removes it without a trace. The program works on the root
//! folder of the node, so that a container can run it.
//!
//! | file | content |
//! |---|---|
//! | `install`, `uninstall` | the commands: their steps and the order of these |
//! | `edit` | changes the text of containerd's configuration |
//! | `containerd` | what containerd makes of a configuration, and its restart |
//! | `record` | what was on the node before |
//! | `host` | enters the node's root folder; one run at a time |
//! | `files`, `command` | files that are replaced as a whole; programs with a deadline |
//! | `places` | where everything is |

mod command;
mod containerd;
mod edit;
mod files;
mod host;
mod install;
mod places;
mod record;
mod uninstall;

use anyhow::Result;
use clap::Subcommand;

/// The subcommands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Installs husk into /opt/husk of a node and registers the runtime with its containerd
    ///
    /// Copies the programs, the guest's kernel and initramfs, checks that they run on the node, adds the runtime "husk"
    /// to containerd's configuration, and restarts containerd. Before that, containerd itself prints its settings with
    /// the old and with the new configuration: no other setting may change. If the restart fails, the old
    /// configuration returns. Running the command again changes nothing, completes an interrupted installation, or
    /// upgrades it.
    ///
    /// Version 2 of the configuration gets a marked block at the end of the file. Later versions import
    /// /opt/husk/containerd.toml.
    Install(install::Options),
    /// Removes what `husk node install` has installed, complete or not, and restarts containerd
    ///
    /// Fails while the node has sandboxes of husk: containerd needs the shim to delete them.
    Uninstall(uninstall::Options),
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Install(options) => install::run(options),
        Command::Uninstall(options) => uninstall::run(options),
    }
}
