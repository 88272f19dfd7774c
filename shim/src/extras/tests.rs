//! The files that can be extras, and the content of the disk.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;

use husk_protos::chain::Chain;
use husk_protos::extras as wire;

use super::disk;
use super::files::{OpenedFile, open};
use crate::config::extras::tests::{extras, file, texts};
use crate::config::settings::Config;

#[test]
fn sources_are_readable_regular_files_within_the_size_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("file"), vec![0; 600 << 10]).unwrap();
    std::os::unix::fs::symlink("file", path("link")).unwrap();
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let small = extras(vec![file("/a", path("file"), 0)], None);
    assert_eq!(open(&small, 1).unwrap().len(), 1);
    let invalid = extras(
        vec![
            file("/a", path("file"), 0),
            file("/b", path("link"), 0),
            file("/c", path("fifo"), 0),
            file("/d", folder.path(), 0),
            file("/e", path("none"), 0),
            file("/f", "/dev/null", 0),
        ],
        None,
    );
    let source = |destination: &str, path: PathBuf, why: &str| {
        format!("annotation io.husk.extras.files[{destination:?}].source = {path:?}: {why}")
    };
    let expected = [
        source("/c", path("fifo"), "not a regular file"),
        source("/d", folder.path().into(), "not a regular file"),
        source("/e", path("none"), "No such file or directory (os error 2)"),
        source("/f", "/dev/null".into(), "not a regular file"),
        "annotation io.husk.extras.files = 1228800 bytes: more than extras_max_mib = 1 in husk's configuration allows"
            .to_owned(),
    ];
    assert_eq!(texts(open(&invalid, 1).unwrap_err()), expected);
    assert_eq!(texts(open(&invalid, 2).unwrap_err()), expected[..4]);

    let large = File::create(path("large")).unwrap();
    let extras = extras(vec![file("/large", path("large"), 0)], None);
    let by_default = Config::default().extras_max_mib;
    for (size, fits) in [(64 << 20, true), ((64 << 20) + 1, false)] {
        large.set_len(size).unwrap();
        assert_eq!(open(&extras, by_default).is_ok(), fits, "{size}");
    }
}

/// A folder with files of these contents, and the opened files.
fn sources(contents: &[&[u8]]) -> (tempfile::TempDir, Vec<OpenedFile>) {
    let folder = tempfile::tempdir().unwrap();
    let files = contents.iter().enumerate().map(|(number, content)| {
        let path = folder.path().join(number.to_string());
        std::fs::write(&path, content).unwrap();
        file(&format!("/{number}"), path, 0o640)
    });
    let extras = extras(files.collect(), None);
    let sources = open(&extras, 64).unwrap();
    (folder, sources)
}

#[test]
fn the_disk_contains_the_files_as_they_were_when_they_were_checked() {
    let (folder, sources) = sources(&[b"one", b"", &[7; 5000]]);
    // Another file takes over a path, and a file grows.
    std::fs::rename(folder.path().join("0"), folder.path().join("x")).unwrap();
    std::fs::write(folder.path().join("0"), "other").unwrap();
    let mut grows = File::options().append(true).open(folder.path().join("1")).unwrap();
    io::Write::write_all(&mut grows, b"more").unwrap();

    let mut images = Vec::new();
    for _ in 0..2 {
        let written = disk::write(&sources).unwrap().unwrap();
        assert_eq!(written.serial, "husk-extras");
        let mut image = written.image.try_clone().unwrap();
        let (mut content, mode) =
            (Vec::new(), std::os::unix::fs::PermissionsExt::mode(&image.metadata().unwrap().permissions()));
        image.rewind().unwrap();
        image.read_to_end(&mut content).unwrap();
        assert_eq!(mode & 0o777, 0o444);
        images.push(content);
        disk::give_back(&written).unwrap();
        let metadata = written.image.metadata().unwrap();
        assert_eq!((metadata.len(), std::os::unix::fs::MetadataExt::blocks(&metadata)), (images[0].len() as u64, 0));
    }
    assert_eq!(images[0], images[1]);
    let image = &images[0];
    let (files, at) = wire::decode(&mut &image[..]).unwrap();
    assert_eq!(
        files.iter().map(|file| (file.path.as_str(), file.mode, file.size)).collect::<Vec<_>>(),
        [("/0", 0o640, 3), ("/1", 0o640, 0), ("/2", 0o640, 5000)]
    );
    assert_eq!((at, image.len()), (4096, 4 * 4096));
    assert_eq!((&image[4096..][..4], &image[8192..][..5001]), (&b"one\0"[..], &[&[7; 5000][..], &[0]].concat()[..]));
}

#[test]
fn a_file_that_has_shrunk_is_reported() {
    let (folder, sources) = sources(&[b"four"]);
    File::options().write(true).open(folder.path().join("0")).unwrap().set_len(2).unwrap();
    let error = Chain(&disk::write(&sources).unwrap_err()).to_string();
    assert!(error.ends_with("\"/0\" in the guest: the file shrank from 4 to 2 bytes after it was checked"), "{error}");
}

#[test]
fn without_files_there_is_no_disk() {
    assert!(disk::write(&[]).unwrap().is_none());
}
