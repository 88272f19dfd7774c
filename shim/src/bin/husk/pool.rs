//! `husk pool`: the VMs that have booted and wait for a sandbox.

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use clap::Subcommand;
use husk_shim::pool::members::{self, Member};
use husk_shim::pool::{launch, request::PoolRequest};
use husk_shim::state::life::now_ms;
use husk_shim::state::{State, base};
use serde_json::{Value, json};

use crate::print::{self, duration, or_dash};

/// The shim's program, in the folder of this one.
const SHIM: &str = "containerd-shim-husk-v1";
const TITLES: [&str; 6] = ["KEY", "STATE", "SHIM", "VCPU", "MEMORY", "AGE"];

/// The subcommands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Lists the VMs that wait
    ///
    /// VMs with the same key may serve the same sandboxes. A VM is `booting`, `waiting`, or `claimed` for a moment.
    List {
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Boots as many VMs as the pool lacks; they boot in the background
    ///
    /// Their number and the limits are in husk's configuration: `pool`, `pool_idle_ms` and `pool_max_memory_mib`. Afterwards
    /// each sandbox that takes a VM boots another. VMs that wait with an older configuration end.
    Fill,
    /// Ends all VMs that wait
    Drain,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::List { json } => list(*json),
        Command::Fill => fill(),
        Command::Drain => {
            let ended = members::drain(&base())?;
            let plural = if ended == 1 { "" } else { "s" };
            Ok(writeln!(io::stdout(), "{ended} VM{plural} ended")?)
        }
    }
}

fn list(as_json: bool) -> Result<()> {
    let waiting = members::waiting(&base())?;
    let mut out = io::stdout().lock();
    if as_json {
        let all: Vec<Value> = waiting.iter().map(|(member, state)| as_value(member, state)).collect();
        print::json(&mut out, &all)?;
        return Ok(());
    }
    let mut rows = vec![TITLES.map(str::to_owned).to_vec()];
    rows.extend(waiting.iter().map(|(member, state)| row(member, state)));
    Ok(out.write_all(print::table(&rows).as_bytes())?)
}

fn as_value(member: &Member, state: &State) -> Value {
    let machine = state.machine();
    json!({
        "id": member.id(),
        "key": member.key(),
        "state": progress(member),
        "shim": state.shim().map(|shim| shim.pid),
        "pid": machine.map(|machine| machine.process.pid),
        "vcpus": machine.map(|machine| machine.vcpus),
        "memory_mib": machine.map(|machine| machine.memory_mib),
        "created_ms": state.created_ms(),
        "dir": state.dir(),
    })
}

fn row(member: &Member, state: &State) -> Vec<String> {
    let machine = state.machine();
    vec![
        member.key().to_owned(),
        progress(member).to_owned(),
        or_dash(state.shim().map(|shim| shim.pid)),
        or_dash(machine.map(|machine| machine.vcpus)),
        or_dash(machine.map(|machine| format!("{} MiB", machine.memory_mib))),
        or_dash(state.created_ms().map(|created| duration(now_ms().saturating_sub(created)))),
    ]
}

fn progress(member: &Member) -> &'static str {
    match (member.is_offered(), member.is_claimed()) {
        (true, _) => "waiting",
        (false, true) => "claimed",
        (false, false) => "booting",
    }
}

fn fill() -> Result<()> {
    let own = std::env::current_exe().context("find this program")?;
    let shim = own.with_file_name(SHIM);
    let status =
        launch::fill(&shim, &PoolRequest::default(), Vec::new()).with_context(|| format!("run {}", shim.display()))?;
    ensure!(status.success(), "{} failed: {status}", shim.display());
    Ok(())
}
