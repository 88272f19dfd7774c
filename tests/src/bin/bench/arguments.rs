//! The command line.

use std::path::PathBuf;

use crate::files;
use crate::report::Column;

/// A part of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Ctr,
    Steps,
    Streams,
    Guest,
    Programs,
    Boot,
    Footprint,
    Host,
    Density,
    Network,
    Pods,
    Pool,
    Files,
    Disks,
    Boots,
}

/// Name on the command line, title in the table, and what is measured. By default, all parts but the last run.
pub(crate) const PARTS: [(Part, &str, &str, &str); 15] = [
    (Part::Ctr, "ctr", "ctr, wall clock", "complete `ctr` commands, husk and runc in turn"),
    (Part::Steps, "steps", "the calls of a `ctr run`, wall clock", "each call that containerd makes for one `ctr run`"),
    (
        Part::Streams,
        "streams",
        "streams of an exec, wall clock",
        "throughput and round trips of a process's stdin, stdout and terminal",
    ),
    (
        Part::Guest,
        "guest",
        "guest, instructions (QEMU -icount shift=0)",
        "guest instructions of a boot and of one container",
    ),
    (
        Part::Programs,
        "programs",
        "programs, executed instructions",
        "what the kernel executes for a boot and for starting programs",
    ),
    (Part::Boot, "boot", "boot, wall clock", "from the start of QEMU to a guest that is ready, and the floor"),
    (Part::Footprint, "footprint", "the init", "size, memory and wake-ups of the guest's init"),
    (Part::Host, "host", "the host, one idle VM", "memory and wake-ups of the VM's processes on the host"),
    (
        Part::Density,
        "density",
        "the host, many VMs",
        "memory, CPU time and wake-ups of many idle VMs, and many starts at once",
    ),
    (
        Part::Network,
        "network",
        "network",
        "throughput and round trips on a CNI bridge, and what a network adds to a start",
    ),
    (
        Part::Pods,
        "pods",
        "pods, calls of the CRI, wall clock",
        "a pod's calls with a pause container, with the Sandbox API, and with runc",
    ),
    (
        Part::Pool,
        "pool",
        "pool of waiting VMs, wall clock",
        "a complete `ctr run` that takes a VM from the pool, and many at once",
    ),
    (
        Part::Files,
        "files",
        "files, in the container",
        "programs on virtio-fs, an overlay, erofs images, a volume and under runc",
    ),
    (Part::Disks, "disks", "disks", "what a disk adds to a create in a VM that runs"),
    (Part::Boots, "boots", "boots in a row", "production VMs that hang; not by default"),
];

const ROUNDS: usize = 20;
const BOOTS: usize = 200;
const VMS: usize = 50;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Help,
    Measure(Arguments),
}

/// What to measure.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) json: Option<PathBuf>,
    pub(crate) rounds: usize,
    pub(crate) parts: Vec<Part>,
    pub(crate) boots: usize,
    pub(crate) vms: usize,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) columns: Vec<Column>,
}

/// Reads the words after the program's name.
///
/// # Errors
/// One line that names the argument.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut words = words.into_iter();
    let parts = PARTS.iter().map(|(part, ..)| *part).filter(|part| *part != Part::Boots).collect();
    let columns = files::COLUMNS.map(|(column, _)| column).to_vec();
    let mut arguments = Arguments { json: None, rounds: ROUNDS, parts, boots: BOOTS, vms: VMS, kernel: None, columns };
    while let Some(argument) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "-h" | "--help" => return Ok(Command::Help),
            "--json" => arguments.json = Some(value()?.into()),
            "--kernel" => arguments.kernel = Some(value()?.into()),
            "--vms" => arguments.vms = number("--vms", &value()?)?,
            "--columns" => arguments.columns = value()?.split(',').map(column).collect::<Result<_, _>>()?,
            "--rounds" => arguments.rounds = number("--rounds", &value()?)?,
            "--only" => {
                let name = value()?;
                let part = PARTS.iter().find(|(_, known, ..)| *known == name);
                let names = PARTS.map(|(_, name, ..)| name).join(", ");
                arguments.parts = vec![part.ok_or_else(|| format!("--only {name}: the parts are {names}"))?.0];
            }
            "boots" => {
                arguments.parts = vec![Part::Boots];
                if let Some(count) = words.next() {
                    arguments.boots = number("boots", &count)?;
                }
            }
            _ => return Err(format!("unknown argument {argument:?}")),
        }
    }
    Ok(Command::Measure(arguments))
}

fn column(name: &str) -> Result<Column, String> {
    let known = files::COLUMNS.iter().find(|(_, known)| *known == name).map(|(column, _)| *column);
    let names = files::COLUMNS.map(|(_, name)| name).join(", ");
    known.ok_or_else(|| format!("--columns {name}: the columns are {names}"))
}

fn number(argument: &str, value: &str) -> Result<usize, String> {
    let number = value.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| format!("{argument} {value}: not a positive number"))
}

/// The text of `--help`.
pub(crate) fn help() -> String {
    let parts: String = PARTS.iter().map(|(_, name, _, what)| format!("  {name:<12}{what}\n")).collect();
    format!(
        "Compares husk with runc under one containerd, and counts the guest's instructions. Needs root, and what
`./task build` and `./task test-tools` make. Prints a table when all parts are measured.

Usage: bench [OPTIONS]
       bench boots [COUNT]   boots COUNT production VMs in a row ({BOOTS} by default) and counts those that hang

Options:
  --only PART   measures one part instead of all
  --rounds N    samples of each wall-clock value ({ROUNDS} by default); throughput takes a quarter as many, round trips
                of a few bytes ten times as many, execs of the part `host` fifty times as many, containers of the part
                `files` a tenth
  --columns A,B columns of the part `files` beside runc: virtiofs, overlay, erofs, volume (all by default)
  --vms N       how many idle VMs the part `density` measures ({VMS} by default)
  --kernel DIR  measures the part `programs` with the kernel that was built in this folder
  --json FILE   also writes the table, the samples and the machine's description to FILE
  -h, --help    prints this text

Parts:
{parts}
Columns:
  husk        the shim, init and kernel in out/
  runc        containerd's runc shim, in the same daemon and on the same network
  floor       the same kernel with an init that only connects to the host: the least that a boot can take
  by hand     the same QEMU, kernel and initramfs, with a tap that `ip` and `tc` connect
  user mode   husk with `io.husk.network=user`
  sandboxer   husk under the Sandbox API of containerd
  no pool     husk without a pool
  virtio-fs   husk with the root filesystem on virtio-fs
  overlay     husk with `rootfs = \"overlay\"`
  erofs       husk with `rootfs = \"erofs\"`
  volume      husk with the files on a volume (`io.husk.volumes`)
  gVisor      containerd's runc shim with gVisor's `runsc` and its platform systrap, if it is in PATH

Units:
  ms              wall-clock milliseconds; p50 is the median, p99 the 99th percentile (nearest rank)
  M instr         millions of guest instructions, which do not depend on the machine or its load
  k instr         thousands of them
  MiB, MiB/s      mebibytes, and mebibytes per second
  Gbit/s          10^9 bits per second, as the receiver counts them
  per s           wake-ups, calls or transactions per second
  k/s             thousands of calls per second
  x               how many times as slow as under runc

Targets:
  The column `target` shows the limit of husk's value in the row's unit, and PASS, OVER or UNDER. A limit that depends
  on runc or on the VM connected by hand is computed from this run. Rows without a limit have no target.
  SPECIFICATION.md lists the limits. A missed target is not a failure, because wall-clock values depend on the load.

Exit status: 0 if all parts were measured, 1 if one failed, 2 for a wrong argument.
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &str) -> Result<Command, String> {
        parse(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_arguments_choose_what_is_measured() {
        let all = || Arguments {
            json: None,
            rounds: 20,
            parts: PARTS[..14].iter().map(|(part, ..)| *part).collect(),
            boots: 200,
            vms: 50,
            kernel: None,
            columns: files::COLUMNS.map(|(column, _)| column).to_vec(),
        };
        let table = [
            ("", Command::Measure(all())),
            ("--rounds 3 --json f", Command::Measure(Arguments { rounds: 3, json: Some("f".into()), ..all() })),
            ("--only network", Command::Measure(Arguments { parts: vec![Part::Network], ..all() })),
            ("--kernel d", Command::Measure(Arguments { kernel: Some("d".into()), ..all() })),
            ("--columns erofs", Command::Measure(Arguments { columns: vec![Column::Erofs], ..all() })),
            ("boots", Command::Measure(Arguments { parts: vec![Part::Boots], ..all() })),
            ("boots 7", Command::Measure(Arguments { parts: vec![Part::Boots], boots: 7, ..all() })),
            ("--only guest --help", Command::Help),
            ("-h", Command::Help),
        ];
        for (words, expected) in table {
            assert_eq!(parsed(words), Ok(expected), "{words}");
        }
    }

    #[test]
    fn a_wrong_argument_is_named_in_one_line() {
        let table = [
            ("--only", "--only needs a value"),
            (
                "--only all",
                "--only all: the parts are ctr, steps, streams, guest, programs, boot, footprint, host, density, network, pods, pool, files, disks, boots",
            ),
            ("--columns volume,x", "--columns x: the columns are virtiofs, overlay, erofs, volume"),
            ("--rounds 0", "--rounds 0: not a positive number"),
            ("--rounds x", "--rounds x: not a positive number"),
            ("boots -1", "boots -1: not a positive number"),
            ("--fast", "unknown argument \"--fast\""),
        ];
        for (words, expected) in table {
            assert_eq!(parsed(words), Err(expected.to_owned()), "{words}");
        }
    }

    #[test]
    fn the_help_names_every_part_and_fits_the_terminal() {
        let help = help();
        assert!(PARTS.iter().all(|(_, name, ..)| help.contains(&format!("\n  {name} "))), "{help}");
        assert!(help.lines().all(|line| line.len() <= 120), "{help}");
    }
}
