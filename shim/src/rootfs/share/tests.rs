//! Tests with real mounts, which require root. A mount namespace that is a slave of the test's stands for virtiofsd's.

use std::os::unix::fs::{MetadataExt, symlink};
use std::process::{Child, Command};
use std::time::Duration;

use husk_protos::chain::Chain;
use nix::mount::{MsFlags, mount};

use super::*;
use crate::state::{Owner, State};

struct Fixture {
    state: Option<State>,
    share: Share,
    server: Child,
    base: tempfile::TempDir,
}

/// Cleans up after a failed test too.
impl Drop for Fixture {
    fn drop(&mut self) {
        let undone = self.state.take().map(|state| state.undo_all(Duration::from_secs(5)));
        let killed = self.server.kill().and_then(|()| self.server.wait());
        if !std::thread::panicking() {
            assert!(matches!(undone, None | Some(Ok(()))), "{undone:?}");
            killed.unwrap();
        }
    }
}

impl Fixture {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let mut state = State::create(base.path(), "ns", "s1").unwrap();
        let dir = state.dir().to_path_buf();
        let share = Share::create(&dir, &mut |steps| state.record(&Owner::Sandbox, steps)).unwrap();
        // Like virtiofsd's sandbox: a mount namespace that is a slave of the host's. The fifo reports that it exists.
        let ready = base.path().join("ready");
        nix::unistd::mkfifo(&ready, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = format!("echo > {}; exec sleep 600", ready.display());
        let server =
            Command::new("unshare").args(["-m", "--propagation", "slave", "sh", "-c", &script]).spawn().unwrap();
        fs::read(&ready).unwrap();
        fs::remove_file(&ready).unwrap();
        Self { state: Some(state), share, server, base }
    }

    fn add(&mut self, id: &str, mounts: &[Mount], rootfs: &Path, binds: &[Bind]) -> Result<Places, ShareError> {
        let state = self.state.as_mut().unwrap();
        let record = &mut |owner: &Owner, steps| state.record(owner, steps);
        let places = self.share.add_container(record, id, ShareRoot::Stacked { mounts, rootfs }, binds)?;
        self.share.attach(self.server(), id)?;
        Ok(places)
    }

    fn server(&self) -> Server<'_, impl FnOnce() -> io::Result<File>> {
        Server { open: || File::open(format!("/proc/{}/ns/mnt", self.server.id())), root: self.share.path() }
    }

    /// Removes a container, and returns the entries that went with it.
    fn remove(&mut self, id: &str) -> Vec<u64> {
        let state = self.state.as_mut().unwrap();
        let Released { entries, volumes } = self.share.release(&mut |owner, steps| state.record(owner, steps), id);
        for owner in volumes.into_iter().chain([Owner::Container(id.into())]) {
            state.undone(state.undoing(owner).run(Duration::from_secs(5))).unwrap();
        }
        entries
    }

    fn settle(&self) -> Result<(), ShareError> {
        self.share.settle(self.server())
    }

    fn dir(&self, name: &str) -> PathBuf {
        let dir = self.base.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A path in the server's mount namespace, where the guest finds `place` with `path` in it.
    fn served(&self, place: &Path, path: &str) -> PathBuf {
        let share = self.share.path().strip_prefix("/").unwrap();
        let place = place.strip_prefix(SHARE_PATH).unwrap().join(path);
        let place = place.to_str().unwrap().trim_end_matches('/');
        Path::new(&format!("/proc/{}/root", self.server.id())).join(share).join(place)
    }

    /// Ends the sandbox, and checks that it leaves nothing.
    fn end(mut self) {
        let base = self.base.path().to_str().unwrap().to_owned();
        self.state.take().unwrap().undo_all(Duration::from_secs(5)).unwrap();
        for table in ["/proc/self/mountinfo".to_owned(), format!("/proc/{}/mountinfo", self.server.id())] {
            let text = fs::read_to_string(&table).unwrap();
            let left: Vec<_> = text.lines().filter(|line| line.contains(&base)).collect();
            assert_eq!(left, Vec::<&str>::new(), "{table}");
        }
        assert!(!self.base.path().join("ns").exists());
    }
}

/// A root without mounts.
fn only(rootfs: &Path) -> ShareRoot<'_> {
    ShareRoot::Stacked { mounts: &[], rootfs }
}

fn overlay(options: &[String]) -> Mount {
    Mount { type_: "overlay".into(), source: "overlay".into(), options: options.to_vec(), ..Default::default() }
}

fn bind_mount(source: &Path, options: &[&str]) -> Mount {
    let options = options.iter().map(ToString::to_string).collect();
    Mount { type_: "bind".into(), source: source.to_str().unwrap().into(), options, ..Default::default() }
}

fn writable(index: usize, source: &Path) -> Bind {
    Bind {
        index,
        source: source.into(),
        is_dir: source.is_dir(),
        read_only: false,
        read_only_below: false,
        own_options: false,
        recursive: true,
        follows_host: false,
        watched: false,
        id_map: None,
    }
}

fn read_only(index: usize, source: &Path) -> Bind {
    Bind { read_only: true, own_options: true, ..writable(index, source) }
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn tmpfs(path: &Path) {
    fs::create_dir_all(path).unwrap();
    mount(Some("husk-test"), path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
}

#[test]
fn an_overlay_mounted_later_is_readable_and_writable_for_the_server() {
    let mut fixture = Fixture::new();
    let layers = ["lower1", "lower2", "upper", "work"].map(|name| fixture.dir(name));
    fs::write(layers[0].join("one"), "1").unwrap();
    fs::write(layers[1].join("two"), "2").unwrap();
    let [lower1, lower2, upper, work] = layers.each_ref().map(|path| path.display());
    let options = [
        format!("lowerdir={lower1}:{lower2}"),
        format!("upperdir={upper}"),
        format!("workdir={work}"),
        "index=off".into(),
    ];
    let root = fixture.add("c1", &[overlay(&options)], Path::new("/nonexistent"), &[]).unwrap().root;
    assert_eq!(fs::read_to_string(fixture.served(&root, "one")).unwrap(), "1");
    fs::write(fixture.served(&root, "three"), "3").unwrap();
    assert_eq!(fs::read_to_string(layers[2].join("three")).unwrap(), "3");
    // Held open by the server, as virtiofsd does until the guest forgets the file.
    let held = fs::File::open(fixture.served(&root, "one")).unwrap();
    assert_eq!(fixture.remove("c1"), [1]);
    assert_eq!(fs::read_dir(fixture.share.path()).unwrap().count(), 0);
    assert!(!fixture.served(&root, "").exists());
    drop(held);
    fixture.end();
}

#[test]
fn the_share_is_a_filesystem_of_its_own() {
    let fixture = Fixture::new();
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_ne!(device(fixture.share.path()), device(fixture.share.path().parent().unwrap()));
    fixture.end();
}

#[test]
fn an_overlay_of_a_hundred_layers_is_mounted() {
    let mut fixture = Fixture::new();
    let long = "a-folder-with-a-name-that-is-long-enough-for-a-page-to-be-too-small";
    let root = fixture.dir(long);
    let layers: Vec<_> = (1..=100).map(|n| fixture.dir(&format!("{long}/{n}/fs"))).collect();
    fs::write(layers[99].join("deep"), "x").unwrap();
    let lower = layers.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(":");
    assert!(lower.len() > 4096);
    let before = std::env::current_dir().unwrap();
    let places = fixture.add("c1", &[overlay(&[format!("lowerdir={lower}")])], &root, &[]).unwrap();
    assert_eq!(fs::read_to_string(fixture.served(&places.root, "deep")).unwrap(), "x");
    assert_eq!(std::env::current_dir().unwrap(), before);
    fixture.end();
}

#[test]
fn a_guest_cannot_change_the_share_outside_of_the_containers_roots() {
    let mut fixture = Fixture::new();
    let image = fixture.dir("image");
    let root = fixture.add("c1", &[], &image, &[]).unwrap().root;
    let served = |path: &str| fixture.served(Path::new(SHARE_PATH), path);
    for (what, result) in [
        ("a link where the next container goes", symlink("/etc", served("2"))),
        ("a folder", fs::create_dir(served("2"))),
        ("a container's folder moved away", fs::rename(served("1"), served("0"))),
        ("a file beside the root", fs::write(served("1/source"), "")),
        ("a mode", fs::set_permissions(served("1"), std::os::unix::fs::PermissionsExt::from_mode(0o777))),
    ] {
        assert_eq!(errno(result), Some(libc::EROFS), "{what}");
    }
    fs::write(fixture.served(&root, "mine"), "").unwrap();
    assert!(image.join("mine").exists());
    fixture.end();
}

#[test]
fn a_read_only_bind_mount_is_read_only_for_the_server_and_below_it_only_if_recursive() {
    let mut fixture = Fixture::new();
    let (image, data) = (fixture.dir("image"), fixture.dir("data"));
    tmpfs(&data.join("sub"));
    let file = fixture.base.path().join("file");
    fs::write(&file, "text").unwrap();
    let flat = Bind { recursive: false, ..writable(3, &data) };
    let recursive = Bind { read_only_below: true, ..read_only(7, &data) };
    let binds = [recursive, read_only(8, &file), read_only(9, &data), flat];
    let places = fixture.add("c1", &[], &image, &binds).unwrap();
    let below = [0, 2].map(|index: usize| places.binds[index].1.join("sub"));
    assert_eq!(places.below, below, "the guest mounts them before the containers' mounts");
    let places = places.binds;
    assert_eq!(places.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [7, 8, 9, 3]);
    let write = |index: usize, path: &str| errno(fs::write(fixture.served(&places[index].1, path), "x"));
    assert_eq!(write(0, "new"), Some(libc::EROFS));
    assert_eq!(write(0, "sub/new"), Some(libc::EROFS));
    assert_eq!(write(1, ""), Some(libc::EROFS));
    assert_eq!(write(2, "new"), Some(libc::EROFS));
    assert_eq!(write(2, "sub/new"), None);
    assert_eq!(write(3, "sub/flat"), None);
    let writer = fixture.add("c2", &[], &image, &[writable(1, &data)]).unwrap();
    assert_eq!(writer.binds[0].1, places[2].1, "one filesystem, whose options concern only its top");
    assert_eq!(writer.below, [""; 0].map(PathBuf::from));
    fixture.settle().unwrap();
    let write = |index: usize, path: &str| errno(fs::write(fixture.served(&places[index].1, path), "x"));
    assert_eq!((write(0, "new"), write(0, "sub/new")), (Some(libc::EROFS), Some(libc::EROFS)));
    assert_eq!(write(2, "new"), None);
    fixture.remove("c2");
    assert!(data.join("new").exists() && data.join("sub/new").exists());
    assert_eq!(fs::read_to_string(fixture.served(&places[1].1, "")).unwrap(), "text");
    fixture.remove("c1");
    // Only the share's copies of the tree are unmounted.
    assert!(data.join("sub/new").exists());
    nix::mount::umount(&data.join("sub")).unwrap();
    assert!(!data.join("sub/new").exists() && data.join("sub/flat").exists());
    fixture.end();
}

#[test]
fn later_mounts_of_the_host_appear_only_if_requested() {
    let mut fixture = Fixture::new();
    let (image, data) = (fixture.dir("image"), fixture.dir("data"));
    tmpfs(&data);
    fs::create_dir(data.join("sub")).unwrap();
    mount(None::<&str>, &data, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    let follows = Bind { follows_host: true, ..writable(1, &data) };
    let places = fixture.add("c1", &[], &image, &[follows, writable(2, &data)]).unwrap().binds;
    tmpfs(&data.join("sub"));
    fs::write(data.join("sub/later"), "").unwrap();
    assert!(fixture.served(&places[0].1, "sub/later").exists());
    assert!(!fixture.served(&places[1].1, "sub/later").exists());
    fixture.remove("c1");
    assert!(data.join("sub/later").exists(), "removing a container must not unmount the host's mounts");
    nix::mount::umount(&data.join("sub")).unwrap();
    nix::mount::umount(&data).unwrap();
    fixture.end();
}

#[test]
fn the_host_can_remove_folders_that_containers_have_mounted_with_mounts_below_them() {
    let mut fixture = Fixture::new();
    let (image, data, file) = (fixture.dir("image"), fixture.dir("data"), fixture.dir("data").join("file"));
    fs::write(&file, "").unwrap();
    let binds = [writable(1, &data), read_only(2, &data), read_only(3, &file)];
    let follower = Bind { follows_host: true, ..writable(4, &data) };
    let folders = ["data/sub", "image/sub"].map(|name| fixture.base.path().join(name));
    folders.iter().for_each(|folder| tmpfs(folder));
    let waiting = |fixture: &mut Fixture| {
        let state = fixture.state.as_mut().unwrap();
        let record = &mut |owner: &Owner, steps| state.record(owner, steps);
        fixture.share.add_container(record, "c2", only(&image), &[writable(1, &image)]).unwrap();
    };
    let places = fixture.add("c1", &[], &image, &[&binds[..], &[follower]].concat()).unwrap();
    waiting(&mut fixture);
    for folder in &folders {
        nix::mount::umount(folder).unwrap();
        fs::remove_dir(folder).unwrap();
    }
    fs::remove_dir_all(&data).unwrap();
    assert!(fixture.served(&places.root, "").exists() && !fixture.served(&places.root, "sub").exists());
    assert_eq!(fixture.remove("c1").len(), 4);
    // One that is not attached yet, and never is.
    assert_eq!(fixture.remove("c2").len(), 2);
    fixture.end();
}

#[test]
fn a_source_is_writable_at_once_if_a_container_that_comes_before_it_is_attached_writes() {
    let mut fixture = Fixture::new();
    let (image, data) = (fixture.dir("image"), fixture.dir("data"));
    let state = fixture.state.as_mut().unwrap();
    let record = &mut |owner: &Owner, steps| state.record(owner, steps);
    let reader = fixture.share.add_container(record, "reader", only(&image), &[read_only(1, &data)]).unwrap();
    let writer = fixture.add("writer", &[], &image, &[writable(1, &data)]).unwrap();
    assert_eq!(reader.binds, writer.binds);
    fs::write(fixture.served(&writer.binds[0].1, "new"), "x").unwrap();
    fixture.share.attach(fixture.server(), "reader").unwrap();
    assert!(fixture.served(&reader.root, "").exists());
    fixture.remove("writer");
    fixture.settle().unwrap();
    assert_eq!(errno(fs::write(fixture.served(&reader.binds[0].1, "new"), "x")), Some(libc::EROFS));
    fixture.remove("reader");
    fixture.end();
}

#[test]
fn roots_can_be_stacked_and_can_be_symbolic_links() {
    let mut fixture = Fixture::new();
    let (first, second) = (fixture.dir("first"), fixture.dir("second"));
    fs::write(second.join("top"), "").unwrap();
    let link = fixture.base.path().join("link");
    symlink(&second, &link).unwrap();
    let mounts = [bind_mount(&first, &["rbind", "rw"]), bind_mount(&link, &["rbind", "ro"])];
    let root = fixture.add("c1", &mounts, Path::new("/nonexistent"), &[]).unwrap().root;
    assert!(fixture.served(&root, "top").exists());
    assert_eq!(errno(fs::write(fixture.served(&root, "new"), "")), Some(libc::EROFS));
    fixture.remove("c1");
    // The same ID again, with the folder as its root, and another name: the guest may remember the old one.
    let again = fixture.add("c1", &[], &link, &[]).unwrap().root;
    assert!(fixture.served(&again, "top").exists());
    assert_ne!(again, root);
    fixture.end();
}

#[test]
fn mounts_of_one_source_share_one_mount_that_is_writable_while_one_of_them_is() {
    let mut fixture = Fixture::new();
    let (image, data) = (fixture.dir("image"), fixture.dir("data"));
    let link = fixture.dir("elsewhere");
    mount(Some(&data), &link, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let binds = |fixture: &mut Fixture, id: &str, binds: &[Bind]| -> Vec<PathBuf> {
        fixture.add(id, &[], &image, binds).unwrap().binds.into_iter().map(|(_, path)| path).collect()
    };
    // By two paths, with and without what is mounted below.
    let flat = Bind { recursive: false, ..read_only(2, &data) };
    let first = binds(&mut fixture, "c1", &[read_only(1, &data), flat, read_only(3, &link)]);
    let place = first[0].clone();
    assert_eq!(first, [place.clone(), place.clone(), place.clone()]);
    let follower = Bind { follows_host: true, ..read_only(1, &data) };
    assert_ne!(binds(&mut fixture, "follower", &[follower])[0], place);
    let write = |fixture: &Fixture| errno(fs::write(fixture.served(&place, "new"), "x"));
    fixture.settle().unwrap();
    assert_eq!(write(&fixture), Some(libc::EROFS));
    // As virtiofsd and the guest know it.
    let known = File::open(fixture.served(&place, "")).unwrap().metadata().unwrap();

    assert_eq!(binds(&mut fixture, "c2", &[read_only(1, &data), writable(2, &data)]), [place.clone(), place.clone()]);
    fixture.settle().unwrap();
    assert_eq!(write(&fixture), None);
    let now = fixture.served(&place, "").metadata().unwrap();
    assert_eq!((now.dev(), now.ino()), (known.dev(), known.ino()));

    // Read-only again, but not while a file is open for writing.
    let open = fs::OpenOptions::new().write(true).open(fixture.served(&place, "new")).unwrap();
    assert_eq!(fixture.remove("c2"), [5]);
    fixture.settle().unwrap();
    assert_eq!(write(&fixture), None);
    drop(open);
    fixture.settle().unwrap();
    assert_eq!(write(&fixture), Some(libc::EROFS));

    assert_eq!(fixture.remove("c1"), [1, 2]);
    assert!(!fixture.served(&place, "").exists());
    // With mounts below, each of which has flags of its own, recursively read-only mounts are separate.
    tmpfs(&data.join("sub"));
    let recursive = Bind { read_only_below: true, ..read_only(2, &data) };
    let below = binds(&mut fixture, "c3", &[read_only(1, &data), recursive, writable(3, &data)]);
    assert!(below[0] == below[2] && below[0] != below[1], "{below:?}");
    fixture.remove("c3");
    for path in [data.join("sub"), link] {
        nix::mount::umount(&path).unwrap();
    }
    fixture.end();
}

#[test]
fn a_failed_mount_is_named_and_leaves_nothing() {
    let mut fixture = Fixture::new();
    let image = fixture.dir("image");
    let gone = Path::new("/nonexistent/source");
    for (mounts, rootfs, binds, expected) in [
        (vec![], gone, vec![], "mount root.path \"/nonexistent/source\" on "),
        (
            vec![],
            image.as_path(),
            vec![Bind { is_dir: true, ..writable(3, gone) }],
            "mount mounts[3].source \"/nonexist",
        ),
        (vec![bind_mount(gone, &["rbind"])], gone, vec![], "mount rootfs[0] (bind \"/nonexistent/source\") on "),
        (vec![bind_mount(&image, &["bind"]), overlay(&["x=y".into()])], gone, vec![], "mount rootfs[1] (overlay \"o"),
        (vec![overlay(&["loop".into()])], gone, vec![], "rootfs[0].options \"loop\": is not supported"),
    ] {
        let error = Chain(&fixture.add("c1", &mounts, rootfs, &binds).unwrap_err()).to_string();
        assert!(error.starts_with(expected), "{expected}\n{error}");
        fixture.remove("c1");
        assert_eq!(fs::read_dir(fixture.share.path()).unwrap().count(), 0);
    }
    assert!(fixture.add("../x", &[], &image, &[]).is_err());
    fixture.end();
}
