//! Files: what programs take on each kind of filesystem that a container can have, and under runc, in one run. Every value
//! is measured in the container, so that none includes the start of an exec.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::{self, wait_for};
use husk_tests::containerd::Container;
use husk_tests::debian::Debian;
use husk_tests::operator;
use serde_json::{Value, json};

use crate::report::{Better, Column, Report};

/// Deadline for one measurement, on a loaded machine that emulates its VMs.
const MEASURE: Duration = Duration::from_secs(600);
/// Deadline for the image of a whole Debian, which is made with the lowest priority.
const IMAGES: Duration = Duration::from_secs(600);
/// Memory of a VM: what a database on a small host has.
const MEMORY_MIB: u32 = 1024;
const VOLUME_MIB: u32 = 2048;

/// What can be measured beside runc.
pub(crate) const COLUMNS: [(Column, &str); 4] = [
    (Column::Virtiofs, "virtiofs"),
    (Column::Overlay, "overlay"),
    (Column::Erofs, "erofs"),
    (Column::Volume, "volume"),
];

/// Where a measurement makes sense.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    /// New files, which can be on a volume.
    Own,
    /// Those of the image.
    Image,
}

/// How a script reports its value.
#[derive(Clone, Copy)]
enum Reported {
    /// A number of microseconds.
    Micros,
    /// fio's JSON: the pointer to a number, and how many make a unit of the row.
    Fio(&'static str, f64),
    /// A number in the row's unit.
    Number,
}

/// Name, unit, which files, how the value is reported, and the script. `$D` is the folder under test.
type Measured = (&'static str, &'static str, Files, Reported, &'static str);

/// What all scripts begin with. EPOCHREALTIME (bash(1)) has six digits after its point.
const PRELUDE: &str = r#"set -e
    timed() { local start=${EPOCHREALTIME/./} end; "$@" >/dev/null; end=${EPOCHREALTIME/./}; echo $((end - start)); }
    disk() { fio --name=disk --filename="$D/fio" --size=64M --thread --output-format=json --runtime=3 "$@"; }
    cached() { disk --invalidate=0 --time_based "$@"; }
    as() { setpriv --reuid=100 --regid=100 --clear-groups "$@"; }
"#;

/// The archive is in memory, so that only its files are measured.
const PREPARE: &str = r#"
    mkdir -p "$D"
    find /usr/lib /usr/share -type f -size -64k | head -n 1200 | tar -cf /dev/shm/files.tar -T - 2>/dev/null
    test "$(tar -tf /dev/shm/files.tar | wc -l)" = 1200
"#;

const BYTES_PER_MIB: f64 = 1_048_576.0;

/// In this order: some need what an earlier one has made.
const MEASURED: [Measured; 17] = [
    ("python3 -c pass, first", "ms", Files::Image, Reported::Micros, "timed python3 -c pass"),
    ("python3 -c pass, again", "ms", Files::Image, Reported::Micros, "timed python3 -c pass"),
    ("python imports, first", "ms", Files::Image, Reported::Micros, IMPORTS),
    ("python imports, again", "ms", Files::Image, Reported::Micros, IMPORTS),
    ("find /, first", "ms", Files::Image, Reported::Micros, "timed find / -xdev"),
    ("find /, again", "ms", Files::Image, Reported::Micros, "timed find / -xdev"),
    (
        "fio, sequential write of 64 MiB, synced",
        "MiB/s",
        Files::Own,
        Reported::Fio("/jobs/0/write/bw_bytes", BYTES_PER_MIB),
        "disk --rw=write --bs=1M --end_fsync=1",
    ),
    (
        "fio, sequential read of 64 MiB",
        "MiB/s",
        Files::Own,
        Reported::Fio("/jobs/0/read/bw_bytes", BYTES_PER_MIB),
        "disk --rw=read --bs=1M",
    ),
    (
        "fio, sequential read, cached",
        "MiB/s",
        Files::Own,
        Reported::Fio("/jobs/0/read/bw_bytes", BYTES_PER_MIB),
        "cached --rw=read --bs=1M",
    ),
    (
        "fio, random 4 KiB reads, cached",
        "k/s",
        Files::Own,
        Reported::Fio("/jobs/0/read/iops", 1000.0),
        "cached --rw=randread --bs=4k",
    ),
    (
        "fio, random 4 KiB writes, each synced",
        "per s",
        Files::Own,
        Reported::Fio("/jobs/0/write/iops", 1.0),
        "cached --rw=randwrite --bs=4k --fsync=1",
    ),
    (
        "fio, random 4 KiB reads of a mapping, cached",
        "k/s",
        Files::Own,
        Reported::Fio("/jobs/0/read/iops", 1000.0),
        "cached --ioengine=mmap --rw=randread --bs=4k",
    ),
    (
        "untar of 1,200 files",
        "ms",
        Files::Own,
        Reported::Micros,
        r#"mkdir "$D/tree"; cd "$D/tree"; timed tar -xf /dev/shm/files.tar"#,
    ),
    (
        "create and remove 2,000 files",
        "ms",
        Files::Own,
        Reported::Micros,
        r#"mkdir "$D/many"; cd "$D/many"
        many() { local i; for ((i = 0; i < 2000; i++)); do : >$i; done; rm -r "$D/many"; }; timed many"#,
    ),
    (
        "git status of 1,200 files",
        "ms",
        Files::Own,
        Reported::Micros,
        r#"cd "$D/tree"; git init -q; git add -A; git -c user.name=x -c user.email=x commit -qm x; timed git status"#,
    ),
    ("initdb", "ms", Files::Own, Reported::Micros, INITDB),
    ("pgbench, one client", "per s", Files::Own, Reported::Number, PGBENCH),
];

const IMPORTS: &str = "timed python3 -c 'import asyncio, unittest, http.server, email.message, sqlite3, decimal, \
     multiprocessing.pool, xml.etree.ElementTree, logging.config, concurrent.futures, argparse, ssl'";

const INITDB: &str = r#"mkdir "$D/pg"; chown 100:100 "$D/pg"; cd "$D/pg"
    timed as initdb --auth=trust --no-instructions -D "$D/pg/data""#;

const PGBENCH: &str = r#"cd "$D/pg"
    as pg_ctl -D data -s -w -l log -o '-c listen_addresses= -c unix_socket_directories=/tmp' start >/dev/null
    export PGHOST=/tmp PGUSER=postgres
    as pgbench -i -s 1 -q postgres >/dev/null 2>&1
    as pgbench -c 1 -T 5 postgres | sed -n 's/^tps = \([0-9.]*\).*/\1/p'
    as pg_ctl -D data -s -w -m fast stop >/dev/null"#;

/// A kind of filesystem, and how a container gets it.
struct Place {
    column: Column,
    flags: Vec<String>,
    folder: &'static str,
    has_image: bool,
    /// What `husk status` calls the root.
    root: &'static str,
}

/// Measures these columns, and runc.
pub(crate) fn run(columns: &[Column], rounds: usize, report: &mut Report) -> Result<()> {
    let debian = Debian::start()?;
    let mut places = Vec::new();
    for (column, name) in COLUMNS.into_iter().filter(|(column, _)| columns.contains(column)) {
        match place(&debian, column, name)? {
            Ok(place) => {
                if column == Column::Erofs {
                    make_images(&debian, &place)?;
                }
                places.push(place);
            }
            Err(why) => report.note(format!("{name}: not measured: {why}")),
        }
    }
    let flags = ["--runtime", Runtime::Runc.name()].map(str::to_owned).to_vec();
    places.push(Place { column: Column::Runc, flags, folder: "/work", has_image: true, root: "" });
    let none = || places.iter().map(|place| (place.column, Vec::new())).collect::<Vec<_>>();
    let mut samples: Vec<Vec<(Column, Vec<f64>)>> = MEASURED.iter().map(|_| none()).collect();
    for round in 0..rounds.div_ceil(10) {
        let started: Vec<Started<'_>> =
            places.iter().map(|place| Started::start(&debian, place, round, place.root)).collect::<Result<_>>()?;
        for (measured, samples) in MEASURED.iter().zip(&mut samples) {
            for (started, (_, values)) in started.iter().zip(samples) {
                values.extend(started.measure(measured).with_context(|| measured.0)?);
            }
        }
    }
    for ((name, unit, ..), mut samples) in MEASURED.into_iter().zip(samples) {
        samples.retain(|(_, values)| !values.is_empty());
        let better = if unit == "ms" { Better::Less } else { Better::More };
        report.beside_runc(name, unit, &samples, better);
    }
    Ok(())
}

/// How a container gets this kind of filesystem, or why this host does not have it.
fn place(debian: &Debian, column: Column, name: &'static str) -> Result<Result<Place, String>> {
    let root = if column == Column::Volume { "" } else { &format!("rootfs = {name:?}\n") };
    let config = debian.config(name, root)?;
    let mut check = operator::command(&debian.containerd, &["check-config", &config.display().to_string()])?;
    // Where the shim finds `mkfs.erofs`.
    check.env("PATH", debian.containerd.search_path());
    let checked = command::run(check, None, operator::SOON)?;
    if checked.code() != 0 {
        return Ok(Err(checked.errors().lines().next().unwrap_or_default().to_owned()));
    }
    let mut flags = vec!["--runtime".to_owned(), Runtime::Husk.name().to_owned()];
    flags.extend(["--runtime-config-path".to_owned(), config.display().to_string()]);
    flags.extend(["--annotation".to_owned(), format!("io.husk.memory_mib={MEMORY_MIB}")]);
    let folder = if column == Column::Volume { "/volume" } else { "/work" };
    let root = if column == Column::Volume { "virtiofs" } else { name };
    Ok(Ok(Place { column, flags, folder, has_image: column != Column::Volume, root }))
}

/// Has images of the layers made: the first container on them starts without.
fn make_images(debian: &Debian, place: &Place) -> Result<()> {
    let first = Started::start(debian, place, 0, "overlay")?;
    wait_for(IMAGES, "the image's layer has an image", || {
        let layers = operator::husk_json(&debian.containerd, &["layers", "--json"]).ok()?;
        (!layers["images"].as_array()?.is_empty()).then_some(())
    })?;
    drop(first);
    Ok(())
}

/// A container in which everything is measured.
struct Started<'a> {
    place: &'a Place,
    container: Container<'a>,
}

impl<'a> Started<'a> {
    /// `root` is how the container must have its root filesystem.
    fn start(debian: &'a Debian, place: &'a Place, round: usize, root: &str) -> Result<Self> {
        let containerd = &debian.containerd;
        let id = containerd.id("files");
        let mut flags: Vec<&str> = vec!["--detach"];
        flags.extend(place.flags.iter().map(String::as_str));
        let source = debian.folder().join(format!("volume-{round}.img"));
        let volume = json!([{"source": source, "destination": place.folder, "size_mib": VOLUME_MIB}]);
        let volume = format!("io.husk.volumes={volume}");
        if place.column == Column::Volume {
            flags.extend(["--annotation", &volume]);
        }
        debian.run(&flags, &id, "exec sleep 100000").ok()?;
        let started = Self { place, container: containerd.adopt(&id) };
        if place.column != Column::Runc {
            let status = operator::husk_json(containerd, &["status", "--json", &id])?;
            ensure!(status["roots"][0]["kind"] == root, "the root is not {root}: {}", status["roots"]);
            let volume = status["disks"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|disk| disk["serial"].as_str().is_some_and(|serial| serial.starts_with("volume")));
            ensure!(volume == (place.column == Column::Volume), "{}", status["disks"]);
        }
        started.script(PREPARE)?;
        Ok(started)
    }

    fn script(&self, script: &str) -> Result<String> {
        let script = format!("D={}\n{PRELUDE}{script}", self.place.folder);
        Ok(self.container.exec(&["bash", "-c", &script]).deadline(MEASURE).ok()?.text())
    }

    /// The value, if it makes sense here.
    fn measure(&self, (_, _, files, reported, script): &Measured) -> Result<Option<f64>> {
        if *files == Files::Image && !self.place.has_image {
            return Ok(None);
        }
        let said = self.script(script)?;
        let value = match reported {
            Reported::Micros => said.parse::<f64>().with_context(|| said.clone())? / 1000.0,
            Reported::Number => said.parse().with_context(|| said.clone())?,
            Reported::Fio(pointer, unit) => {
                let fio: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
                fio.pointer(pointer).and_then(Value::as_f64).with_context(|| said.clone())? / unit
            }
        };
        ensure!(value > 0.0, "the value is {value}");
        Ok(Some(value))
    }
}
