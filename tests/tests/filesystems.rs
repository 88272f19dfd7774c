//! What the filesystems of a container can and cannot do, compared with runc and with docs/filesystems.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::artifacts::{Runtime, repository};
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::operator::{husk, husk_json};
use husk_tests::vm::guest_program;

/// virtiofsd's limit of open files in the test of it, and how many files the walked tree has unless `HUSK_TEST_TREE`
/// says so. The tree is below `TMPDIR`.
const OPEN_FILES: u64 = 2048;
const TREE: usize = 4000;
/// Files in one folder of the tree.
const FOLDER: usize = 100;
/// The slowest walk, files per second: an emulated guest on a loaded machine.
const WALK: usize = 100;

/// `--mount` of a host path.
fn bind(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

/// How many files virtiofsd has open for a container's VM, and how many it may have.
fn open_files(containerd: &Containerd, container: &Container<'_>) -> Result<(u64, u64)> {
    let status = husk_json(containerd, &["status", container.id(), "--json"])?;
    let files = |key: &str| status["files"][key].as_u64().with_context(|| format!("no files.{key} in {status}"));
    Ok((files("open")?, files("limit")?))
}

#[test]
fn programs_still_start_after_walks_over_more_files_than_virtiofsd_may_have_open() -> Result<()> {
    let tree = std::env::var("HUSK_TEST_TREE").map_or(Ok(TREE), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    for n in 0..tree {
        let below = folder.path().join((n / FOLDER).to_string());
        if n % FOLDER == 0 {
            fs::create_dir(&below)?;
        }
        fs::write(below.join(n.to_string()), "")?;
    }
    let configured = Configured::start(&format!("virtiofsd_open_files = {OPEN_FILES}\n"))?;
    let containerd = &configured.containerd;
    let mount = bind(folder.path(), "/tree", "rbind:rw");
    let container = containerd.detached(&["--mount", &mount], "walk", &["sleep", "1000000"])?;
    // `-size` looks at each file. Each round starts programs. Files that are open stay usable.
    let walk = "exec 8</tree/0/0; for round in 1 2; do find /tree -type f -size -1 | wc -l; done; \
        find / -xdev -size -1 | wc -l > /dev/null; cat <&8; cat /tree/0/*; echo done";
    let deadline = Duration::from_secs(60) + Duration::from_secs((2 * tree / WALK) as u64);
    let walked = container.exec(&["sh", "-c", walk]).deadline(deadline).ok()?.text();
    let count = tree.to_string();
    ensure!(walked.split_whitespace().eq([count.as_str(), count.as_str(), "done"]), "{walked}");
    let (open, limit) = open_files(containerd, &container)?;
    ensure!(limit == OPEN_FILES && open < limit, "{open} of {limit}");
    let page = husk(containerd, &["status", container.id()])?.ok()?.text();
    ensure!(page.contains(&format!("open, of at most {OPEN_FILES}")), "{page}");
    Ok(())
}

#[test]
fn a_limit_of_open_files_that_the_host_does_not_allow_is_logged_and_shown() -> Result<()> {
    const CONFIGURED: u64 = 1_048_576;
    let configured = Configured::start(&format!("virtiofsd_open_files = {CONFIGURED}\n"))?;
    let containerd = &configured.containerd;
    let container = containerd.detached(&[], "limit", &["sleep", "600"])?;
    // Whether the host allows it depends on the machine. What husk says must be true on each.
    let (open, limit) = open_files(containerd, &container)?;
    let qemus_sibling = containerd.shim_child(container.id(), "virtiofsd")?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", qemus_sibling.pid))?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit of open files")?;
    ensure!(line.split_whitespace().nth(3) == Some(&limit.to_string()) && (1..limit).contains(&open), "{line}: {open}");
    let warning = "the host's limit of open files is lower";
    let warned =
        limit < CONFIGURED && containerd.await_logged(warning, 1).is_ok() || !containerd.logged(warning).is_empty();
    let shown = husk(containerd, &["status", container.id()])?.ok()?.text().contains("does not allow the configured");
    ensure!((warned, shown) == (limit < CONFIGURED, limit < CONFIGURED), "limit {limit}: {warned} {shown}");
    Ok(())
}

#[test]
fn two_sandboxes_that_can_write_to_one_volume_are_named_once_in_the_log_and_in_the_status() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (shared, read) = (tempfile::tempdir()?, tempfile::tempdir()?);
    fs::create_dir(shared.path().join("below"))?;
    let writable =
        [bind(shared.path(), "/shared", "rbind:rw"), bind(&shared.path().join("below"), "/below", "rbind:rw")];
    let readable = [bind(read.path(), "/read", "rbind:ro"), bind(read.path(), "/read", "rbind:rw")];
    let start = |name: &str, mounts: [&str; 2]| {
        containerd.detached(&["--mount", mounts[0], "--mount", mounts[1]], name, &["sleep", "600"])
    };
    let first = start("first", [&writable[0], &readable[0]])?;
    let second = start("second", [&writable[1], &readable[1]])?;
    let shares = |container: &Container<'_>| -> Result<Vec<String>> {
        let status = husk_json(containerd, &["status", container.id(), "--json"])?;
        let volumes = status["shared_volumes"].as_array().cloned().unwrap_or_default();
        Ok(volumes.iter().map(|volume| format!("{} {}", volume["path"], volume["sandbox"])).collect())
    };
    let one = |path: &Path, with: &Container<'_>| vec![format!("{:?} {:?}", path.display().to_string(), with.id())];
    ensure!(shares(&first)? == one(shared.path(), &second), "{:?}", shares(&first)?);
    ensure!(shares(&second)? == one(&shared.path().join("below"), &first), "{:?}", shares(&second)?);
    let page = husk(containerd, &["status", second.id()])?.ok()?.text();
    ensure!(page.contains(&format!("WARNING     sandbox {} in namespace", first.id())), "{page}");
    let warnings = containerd.await_logged("another sandbox can write to the same volume", 1)?;
    ensure!(warnings.len() == 1 && warnings[0].contains(first.id()), "{warnings:#?}");

    // However a sandbox ends, it shares nothing then.
    let (shim, _) = containerd.shim_of(first.id())?;
    shim.kill();
    husk_tests::command::wait_for(Duration::from_secs(30), "the killed shim's lease ends", || {
        shares(&second).map(|shares| shares.is_empty().then_some(())).transpose()
    })??;
    let ids = [first.id().to_owned(), second.id().to_owned()];
    // Other tests have leases of their own.
    let leases = || -> Result<Vec<String>> {
        let names = match fs::read_dir(containerd.path("/run/husk/.volumes")) {
            Ok(listing) => listing.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>()?,
            // The last lease takes the folder with it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let names = names.iter().map(|name| name.to_string_lossy().into_owned());
        Ok(names.filter(|name| ids.iter().any(|id| name.ends_with(id))).collect())
    };
    // containerd does not wait for a slow shim's end.
    let left = |count: usize| {
        husk_tests::command::wait_for(Duration::from_secs(60), &format!("{count} leases are left"), || {
            leases().map(|left| (left.len() == count).then_some(())).transpose()
        })?
    };
    drop(first);
    left(1)?;
    drop(second);
    left(0)
}

/// Outcomes of the checks of `tests/src/bin/files/main.rs`, by place and name.
fn outcomes(containerd: &Containerd, runtime: Runtime) -> Result<BTreeMap<(String, String), String>> {
    // Not in /tmp, which may be a tmpfs: docs/filesystems.md describes folders on a disk.
    let volume = tempfile::tempdir_in(repository().join("target"))?;
    let program = bind(&guest_program("files")?, "/files", "rbind:ro");
    let flags = ["--privileged", "--mount", &program, "--mount", &bind(volume.path(), "/volume", "rbind:rw")];
    let container = containerd.detached_with(runtime, &flags, "files", &["sleep", "600"])?;
    let mut outcomes = BTreeMap::new();
    for (place, folder) in [("root", "/srv"), ("volume", "/volume")] {
        let tried = container.script(&format!("mkdir -p {folder} && /files {folder}"))?;
        for line in tried.lines() {
            let (name, outcome) = line.split_once(": ").with_context(|| line.to_owned())?;
            outcomes.insert((name.to_owned(), place.to_owned()), outcome.to_owned());
        }
    }
    Ok(outcomes)
}

/// The rows of the table of differences in docs/filesystems.md: check, place, outcomes under runc and under husk.
fn documented() -> Result<BTreeSet<[String; 4]>> {
    let page = fs::read_to_string(repository().join("docs/filesystems.md"))?;
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let mut documented = BTreeSet::new();
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let [_, name, places, runc, husk, ..] = cells[..] else { continue };
        documented.extend(places.split(", ").map(|place| [name, place, runc, husk].map(str::to_owned)));
    }
    Ok(documented)
}

#[test]
fn filesystems_differ_from_runcs_where_the_documentation_says_so() -> Result<()> {
    let containerd = Containerd::shared()?;
    let (under_husk, under_runc) = (outcomes(containerd, Runtime::Husk)?, outcomes(containerd, Runtime::Runc)?);
    ensure!(under_husk.len() > 80 && under_husk.keys().eq(under_runc.keys()), "{under_husk:#?}\n{under_runc:#?}");
    let differences: BTreeSet<[String; 4]> = under_husk
        .into_iter()
        .filter_map(|((name, place), husk)| {
            let runc = under_runc.get(&(name.clone(), place.clone()))?.clone();
            (runc != husk).then_some([name, place, runc, husk])
        })
        .collect();
    let documented = documented()?;
    ensure!(
        differences == documented,
        "not in docs/filesystems.md: {:#?}\nonly there: {:#?}",
        differences.difference(&documented),
        documented.difference(&differences)
    );
    Ok(())
}
