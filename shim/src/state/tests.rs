//! The state with real effects: mounts, processes and cgroups in a temporary directory. Needs root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use procfs::process::Process;

use super::error::{StateError, check_identifier};
use super::life::{Life, VmState};
use super::store::{FILE, Owner, State};
use super::undo::Step;
use crate::host::cgroup::User;
use crate::host::process::ProcessId;
use crate::network::Claim;
use crate::vm::cgroup::Hierarchies;

const WITHIN: Duration = Duration::from_secs(5);

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn tmpfs(path: &Path) {
    fs::create_dir_all(path).unwrap();
    mount(Some("husk-test"), path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
}

fn mounted_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = Process::myself().unwrap().mountinfo().unwrap();
    mounts.into_iter().map(|mount| mount.mount_point).filter(|point| point.starts_with(dir)).collect()
}

fn sleeper() -> (Child, ProcessId) {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    let id = ProcessId::of(child.id()).unwrap().unwrap();
    (child, id)
}

fn container(id: &str) -> Owner {
    Owner::Container(id.into())
}

#[test]
fn identifiers_follow_containerds_rule() {
    let longest = "a".repeat(76);
    for valid in ["a", "default", "k8s.io", "a-b_c.d", "0", longest.as_str()] {
        check_identifier("x", valid).unwrap();
    }
    let too_long = "a".repeat(77);
    for invalid in ["", ".", "..", "a/b", "../a", "-a", "a-", "a..b", "a.-b", "ä", "a b", "a\n", too_long.as_str()] {
        let error = check_identifier("sandbox id", invalid).unwrap_err().to_string();
        assert!(error.starts_with("sandbox id "), "{invalid}: {error}");
    }
    assert!(State::create(Path::new("/nonexistent"), "..", "a").is_err());
    assert!(State::load(Path::new("/nonexistent"), "default", "../../etc").is_err());
}

#[test]
fn directory_and_file_are_private_and_read_back() {
    let base = tempfile::tempdir().unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    assert_eq!(state.vm(), Some(&Life::default()));
    assert_eq!(state.set_vm_state(VmState::Provisioning, "a container needs it").unwrap(), VmState::Pending);
    state.set_container("c1", serde_json::json!({"bundle": "/b"})).unwrap();
    let file = Step::File { path: base.path().join("x") };
    state.record(&container("c1"), [file.clone()]).unwrap();
    assert_eq!(mode(&base.path().join("ns")), 0o700);
    assert_eq!(mode(state.dir()), 0o700);
    assert_eq!(mode(&state.dir().join(FILE)), 0o600);
    assert!(matches!(State::create(base.path(), "ns", "s1"), Err(StateError::Exists(_))));

    let again = State::load(base.path(), "ns", "s1").unwrap();
    assert_eq!(again.vm(), state.vm(), "the state was not written with the next change");
    assert_eq!(again.vm().unwrap().transitions().next().unwrap().cause, "a container needs it");
    assert_eq!(again.containers()["c1"]["bundle"], "/b");
    assert_eq!(again.steps(&container("c1")).collect::<Vec<_>>(), [&file]);
    assert!(again.shim_lives().unwrap());
    again.undo_all(WITHIN).unwrap();
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    assert!(matches!(State::load(base.path(), "ns", "s1"), Err(StateError::NotFound(_))));
}

#[test]
fn a_directory_without_a_file_is_a_sandbox_without_effects() {
    let base = tempfile::tempdir().unwrap();
    fs::create_dir_all(base.path().join("ns/s1")).unwrap();
    let state = State::load(base.path(), "ns", "s1").unwrap();
    assert!(!state.shim_lives().unwrap());
    assert_eq!(state.vm(), None);
    state.undo_all(WITHIN).unwrap();
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn a_damaged_or_foreign_file_is_rejected_and_kept() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("ns/s1");
    fs::create_dir_all(&dir).unwrap();
    let other = r#"{"version":2,"namespace":"ns","sandbox":"s1","shim":null,"containers":{},"vm":null,"journal":[]}"#;
    for text in ["", "{}", "[", other] {
        fs::write(dir.join(FILE), text).unwrap();
        assert!(matches!(State::load(base.path(), "ns", "s1"), Err(StateError::Unreadable { .. })), "{text}");
    }
    assert!(dir.join(FILE).exists());
}

#[test]
fn a_later_process_undoes_everything_and_touches_nothing_else() {
    let base = tempfile::tempdir().unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    // Another sandbox keeps the namespace's directory.
    let neighbour = State::create(base.path(), "ns", "s2").unwrap();
    let dir = state.dir().to_path_buf();
    let owner = Owner::Sandbox;

    let (busy, tree, empty, file) = (dir.join("busy"), dir.join("tree"), dir.join("empty"), dir.join("file"));
    state
        .record(
            &owner,
            [
                Step::Dir { path: busy.clone() },
                Step::Mount { path: busy.clone() },
                Step::Mount { path: busy.clone() },
                Step::Tree { path: tree.clone() },
                Step::Dir { path: empty.clone() },
                Step::File { path: file.clone() },
                // The shim was killed before the effects of these steps.
                Step::Mount { path: dir.join("never") },
                Step::Dir { path: dir.join("never") },
                Step::File { path: file.join("never") },
                // A network namespace that is gone.
                Step::Network { claim: Claim { netns: dir.join("never"), device: 1, inode: 2 }, vm: "ns/s1".into() },
            ],
        )
        .unwrap();
    tmpfs(&busy);
    tmpfs(&busy);
    // An open file keeps the mount busy, as virtiofsd's files do.
    let held = fs::File::create(busy.join("held")).unwrap();
    let outside = base.path().join("outside");
    fs::write(&outside, "kept").unwrap();
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/c"), "x").unwrap();
    symlink(&outside, tree.join("a/link")).unwrap();
    symlink(base.path(), tree.join("a/dirlink")).unwrap();
    fs::create_dir(&empty).unwrap();
    fs::write(&file, "").unwrap();

    let made = Hierarchies::of_host()
        .unwrap()
        .create(&mut |steps| state.record(&owner, steps), User::new("ns", "s1"), "/husk-test-undo/s1")
        .unwrap();
    let (mut ours, ours_id) = sleeper();
    let (mut grandchild, grandchild_id) = sleeper();
    let (mut theirs, theirs_id) = sleeper();
    for procs in made.procs_files() {
        fs::write(procs, ours_id.pid.to_string()).unwrap();
        fs::write(procs, grandchild_id.pid.to_string()).unwrap();
    }
    let name = "sleep".to_owned();
    let reused = ProcessId { start_time: theirs_id.start_time - 1, ..theirs_id };
    state.record(&owner, [Step::Process { id: ours_id, name: name.clone() }]).unwrap();
    state.record(&owner, [Step::Process { id: reused, name }]).unwrap();
    drop(state);

    State::load(base.path(), "ns", "s1").unwrap().undo_all(WITHIN).unwrap();
    drop(held);
    assert!(!ours.wait().unwrap().success());
    assert!(!grandchild.wait().unwrap().success());
    assert!(theirs.try_wait().unwrap().is_none(), "a process with a reused PID was killed");
    theirs.kill().unwrap();
    theirs.wait().unwrap();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "kept");
    assert!(!dir.exists());
    assert_eq!(mounted_below(base.path()), Vec::<PathBuf>::new());
    for procs in made.procs_files() {
        let leaf = procs.parent().unwrap();
        assert!(!leaf.exists() && !leaf.parent().unwrap().exists(), "{}", leaf.display());
    }
    assert!(base.path().join("ns").exists());
    neighbour.undo_all(WITHIN).unwrap();
    assert!(!base.path().join("ns").exists());
}

#[test]
fn undoing_one_containers_steps_leaves_the_others() {
    let base = tempfile::tempdir().unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    let paths = ["sandbox", "c1", "c2"].map(|name| state.dir().join(name));
    for (owner, path) in [Owner::Sandbox, container("c1"), container("c2")].iter().zip(&paths) {
        state.record(owner, [Step::Dir { path: path.clone() }]).unwrap();
        fs::create_dir(path).unwrap();
    }
    state.set_container("c1", serde_json::Value::Null).unwrap();
    state.undone(state.undoing(container("c1")).run(WITHIN)).unwrap();
    state.undone(state.undoing(container("c1")).run(WITHIN)).unwrap();
    assert_eq!(paths.each_ref().map(|p| p.exists()), [true, false, true]);
    assert!(state.containers().is_empty());
    let again = State::load(base.path(), "ns", "s1").unwrap();
    assert_eq!(again.steps(&container("c1")).count(), 0);
    assert_eq!(again.steps(&container("c2")).count(), 1);
    again.undo_all(WITHIN).unwrap();
}

#[test]
fn a_mount_point_in_a_tree_is_not_entered_and_stays_in_the_journal() {
    let base = tempfile::tempdir().unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    let (tree, first) = (state.dir().join("tree"), state.dir().join("first"));
    let precious = base.path().join("precious");
    fs::create_dir_all(&precious).unwrap();
    fs::write(precious.join("data"), "kept").unwrap();
    let last = Step::Dir { path: first.clone() };
    state.record(&Owner::Sandbox, [last, Step::Tree { path: tree.clone() }]).unwrap();
    fs::create_dir_all(tree.join("a/bound")).unwrap();
    fs::create_dir_all(&first).unwrap();
    // Bind from the same filesystem: device numbers do not reveal this mount point.
    mount(Some(&precious), &tree.join("a/bound"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();

    let error = state.undo_all(WITHIN).unwrap_err().to_string();
    assert!(error.contains("tree") && error.contains("bound: a mount point"), "{error}");
    assert_eq!(fs::read_to_string(precious.join("data")).unwrap(), "kept");
    assert!(!first.exists(), "a failing step stopped the others");

    let mut again = State::load(base.path(), "ns", "s1").unwrap();
    assert_eq!(again.steps(&Owner::Sandbox).count(), 1);
    again.record(&Owner::Sandbox, [Step::Mount { path: tree.join("a/bound") }]).unwrap();
    again.undo_all(WITHIN).unwrap();
    assert_eq!(mounted_below(base.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_recorded_network_can_be_read_back() {
    let base = tempfile::tempdir().unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    let claim = crate::network::Claim { netns: "/run/netns/x".into(), device: 4, inode: 7 };
    let step = Step::Network { claim, vm: "ns/s1".into() };
    state.record(&Owner::Sandbox, [step.clone()]).unwrap();
    let read = State::load(base.path(), "ns", "s1").unwrap();
    assert_eq!(read.steps(&Owner::Sandbox).collect::<Vec<_>>(), [&step]);
}

#[test]
fn recording_a_step_is_fast() {
    let base = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut state = State::create(base.path(), "ns", "s1").unwrap();
    let started = Instant::now();
    for n in 0..100 {
        state.record(&Owner::Sandbox, [Step::File { path: base.path().join(n.to_string()) }]).unwrap();
    }
    let each = started.elapsed() / 100;
    assert!(each < Duration::from_millis(5), "{each:?} per step");
    state.undo_all(WITHIN).unwrap();
}
