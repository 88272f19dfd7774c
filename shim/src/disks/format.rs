//! Makes a filesystem on a blank file with mke2fs. The file is husk's own: mke2fs reads nothing that a guest has written.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::image::Image;
use crate::host::child::{ChildExit, FIRST_FD, Launch, LaunchError};
use crate::host::text::clean;

const PROGRAM: &str = "mke2fs";
/// Where the program is besides PATH: containerd's has no sbin on some hosts.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// mke2fs writes few blocks of a sparse file. A full or slow disk of the host ends it.
const DEADLINE: Duration = Duration::from_secs(60);
/// Most bytes of its output that a message shows.
const SHOWN: u64 = 512;

/// Why a file cannot be formatted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormatError {
    /// The program is missing.
    #[error("{PROGRAM} is not installed on the host: install e2fsprogs")]
    Missing,
    /// The program cannot be started.
    #[error("start {PROGRAM}")]
    Start(#[from] LaunchError),
    /// The program failed.
    #[error("{PROGRAM} {exit}: {output}")]
    Failed { exit: ChildExit, output: String },
    /// The program did not end.
    #[error("{PROGRAM} did not end within {} s", DEADLINE.as_secs())]
    Deadline,
    /// Its output or the image.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Makes an ext4 filesystem on a blank file, and returns when the host's disk has it.
///
/// # Errors
/// See [`FormatError`].
pub(super) async fn ext4(image: &Image) -> Result<(), FormatError> {
    let output = File::from(memfd_create(c"husk-mke2fs", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    let target = Image::inherited(FIRST_FD);
    // A blank file needs no zeroes for the journal. mke2fs knows by itself that it needs none for the tables of inodes.
    let args = ["-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0,lazy_journal_init=1", &target];
    let launch = Launch {
        program: find().ok_or(FormatError::Missing)?,
        args: args.map(Into::into).to_vec(),
        env: Vec::new(),
        fds: vec![(image.file().try_clone()?.into(), FIRST_FD)],
        jail: None,
        output: output.try_clone()?,
        cgroups: Vec::new(),
        leads: false,
    };
    let child = launch.spawn()?;
    let Ok(exit) = tokio::time::timeout(DEADLINE, child.exited()).await else {
        child.kill();
        return Err(FormatError::Deadline);
    };
    if !exit.0.success() {
        return Err(FormatError::Failed { exit, output: read(output)? });
    }
    tracing::debug!(image = image.number(), "formatted");
    let written = image.file().try_clone()?;
    tokio::task::spawn_blocking(move || written.sync_all()).await.map_err(io::Error::other)??;
    Ok(())
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SBIN.map(PathBuf::from));
    folders.map(|folder| folder.join(PROGRAM)).find(|program| program.is_file())
}

fn read(mut output: File) -> io::Result<String> {
    let mut text = Vec::new();
    output.rewind()?;
    output.take(SHOWN).read_to_end(&mut text)?;
    Ok(clean(String::from_utf8_lossy(&text).trim()))
}
