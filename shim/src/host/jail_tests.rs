//! Programs in jails.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sched::CloneFlags;

use super::child::{Child, FIRST_FD, Launch};
use super::jail::loader::Loader;
use super::jail::root::{self, RootFile};
use super::jail::{Jail, User};

fn start(script: &str, output: &File, fds: Vec<(OwnedFd, i32)>, jail: Option<Jail>) -> Child {
    let launch = Launch {
        program: "/bin/bash".into(),
        args: ["-c".into(), script.into()].to_vec(),
        env: Vec::new(),
        fds,
        jail,
        output: output.try_clone().unwrap(),
        cgroups: Vec::new(),
        leads: false,
    };
    launch.spawn().unwrap()
}

fn written(mut file: File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

/// The lines of a program's own status that begin with these names.
fn status(text: &str, names: &[&str]) -> Vec<String> {
    let line = |name: &&str| text.lines().find(|line| line.split(':').next() == Some(*name)).unwrap_or_default();
    names.iter().map(|name| line(name).split_whitespace().skip(1).collect::<Vec<_>>().join(" ")).collect()
}

#[tokio::test]
async fn a_jailed_program_has_its_own_user_and_namespaces_and_no_privileges() {
    let output = tempfile::tempfile().unwrap();
    let user = User { uid: 65534, gid: 65533, groups: vec![7] };
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
    let loader = Loader::unreadable(Path::new("/bin/bash")).unwrap();
    let jail = Jail { namespaces, user: Some(user), loader, filter: None, capabilities: None, read_only: false };
    // The other end tells when the program may go on.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = format!("echo $$; while read line; do echo \"$line\"; done </proc/self/status; read <&{FIRST_FD}");
    let child = start(&script, &output, vec![(theirs.into(), FIRST_FD)], Some(jail));
    let pid = child.process().pid;
    for namespace in ["mnt", "pid", "net"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    // Not even its own user may read its memory: the file is root's.
    let memory = std::fs::metadata(format!("/proc/{pid}/mem")).unwrap();
    assert_eq!(memory.uid(), 0);
    drop(ours);
    assert_eq!(child.exited().await.to_string(), "exited with status 1");
    let text = written(output);
    assert_eq!(text.lines().next(), Some("1"), "{text}");
    let names = ["Uid", "Gid", "Groups", "CapEff", "NoNewPrivs"];
    let none = "0000000000000000";
    let expected = ["65534 65534 65534 65534", "65533 65533 65533 65533", "7", none, "1"];
    assert_eq!(status(&text, &names), expected, "{text}");
}

#[tokio::test]
async fn programs_with_pid_namespaces_start_one_after_the_other_and_others_stay_in_the_shims() {
    let output = tempfile::tempfile().unwrap();
    for own in [true, true, false] {
        let jail = own.then(|| Jail {
            namespaces: CloneFlags::CLONE_NEWPID,
            user: None,
            loader: None,
            filter: None,
            capabilities: None,
            read_only: false,
        });
        let child = start("[ $$ = 1 ] && exit 1; exit 2", &output, Vec::new(), jail);
        assert_eq!(child.exited().await.0.code(), Some(if own { 1 } else { 2 }));
    }
}

#[tokio::test]
async fn a_process_without_a_mount_namespace_of_its_own_keeps_its_root() {
    let output = tempfile::tempfile().unwrap();
    let child = start("exec sleep 60", &output, Vec::new(), None);
    let error = root::empty(child.process(), &[]).unwrap_err().to_string();
    assert_eq!(error, "the process is in the caller's mount namespace");
    child.kill();
    child.exited().await;
}

#[tokio::test]
async fn a_jailed_program_can_lose_its_root() {
    let output = tempfile::tempfile().unwrap();
    let jail = Jail {
        namespaces: CloneFlags::CLONE_NEWNS,
        user: None,
        loader: None,
        filter: None,
        capabilities: None,
        read_only: false,
    };
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    // Built into the shell, which can start nothing from an empty root.
    let script = format!(
        "echo >&{FIRST_FD}; read <&{FIRST_FD}; cd /; echo * \"$(</etc/file)\"; {{ echo >/new; }} 2>&{FIRST_FD} || echo no"
    );
    let child = start(&script, &output, vec![(theirs.into(), FIRST_FD)], Some(jail));
    ours.read_exact(&mut [0]).unwrap();
    let file = RootFile { folder: "etc", name: "file", contents: b"contents".to_vec() };
    root::empty(child.process(), &[file]).unwrap();
    ours.write_all(b"\n").unwrap();
    child.exited().await;
    assert_eq!(written(output), "etc contents\nno\n");
}

#[tokio::test]
async fn root_in_a_jail_can_keep_two_capabilities_and_write_to_nothing_but_its_descriptors() {
    let output = tempfile::tempfile().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = tempfile::NamedTempFile::new_in(&folder).unwrap();
    let jail = Jail {
        namespaces: CloneFlags::CLONE_NEWNS,
        user: None,
        loader: None,
        filter: None,
        // CAP_DAC_READ_SEARCH and CAP_SYS_ADMIN.
        capabilities: Some(1 << 2 | 1 << 21),
        read_only: true,
    };
    let (old, new) = (file.path().display().to_string(), folder.path().join("new").display().to_string());
    let script = format!(
        "while read line; do echo \"$line\"; done </proc/self/status
        for path in {old} {new} /dev/null; do {{ echo x >\"$path\"; }} 2>&{FIRST_FD} && echo \"wrote $path\"; done
        echo inherited >/proc/self/fd/{FIRST_FD}"
    );
    let inherited = file.reopen().unwrap();
    let child = start(&script, &output, vec![(inherited.into(), FIRST_FD)], Some(jail));
    assert_eq!(child.exited().await.to_string(), "exited with status 0");
    let text = written(output);
    let kept = "0000000000200004";
    assert_eq!(status(&text, &["CapPrm", "CapEff", "CapBnd"]), [kept; 3], "{text}");
    assert!(!text.contains("wrote"), "{text}");
    assert!(std::fs::read_to_string(file.path()).unwrap().ends_with("inherited\n"));
    assert!(!folder.path().join("new").exists());
}
