//! Makes filesystems on blank files with the host's mkfs programs. The files are husk's own: the programs read nothing that
//! a guest has written, unless they are in a jail.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::linkat;

use super::image::Image;
use crate::host::child::{ChildExit, FIRST_FD, Launch, LaunchError};
use crate::host::jail::Jail;
use crate::host::text::clean;

/// Where the programs are besides PATH: containerd's has no sbin on some hosts.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// The program for ext4.
pub(super) const EXT4: &str = "mke2fs";
/// Of a filesystem that ends with its VM. Without blocks for a larger one, a sixteenth is written. Without checksums of
/// its metadata, which nothing could damage unnoticed, changes take fewer instructions; those of the groups remain, for they
/// say which tables are blank.
const FEATURES_OF_VM: &str = "^has_journal,^resize_inode,^metadata_csum,uninit_bg";
/// The programs write few blocks of a sparse file. A full or slow disk of the host ends them.
const DEADLINE: Duration = Duration::from_secs(60);
/// Most bytes of their output that a message shows.
const SHOWN: u64 = 512;

/// Why a file cannot be formatted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormatError {
    /// The program is missing.
    #[error("{program} is not installed on the host: install {package}")]
    Missing {
        program: String,
        /// Debian's package.
        package: &'static str,
    },
    /// The program cannot be started.
    #[error("start {program}")]
    Start { program: String, source: LaunchError },
    /// The program failed.
    #[error("{program} {exit}: {output}")]
    Failed { program: String, exit: ChildExit, output: String },
    /// The program did not end.
    #[error("{program} did not end within {} s", within.as_secs())]
    Deadline { program: String, within: Duration },
    /// Its output or the image.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// An image that is to be created.
    #[error("create the image {}", path.display())]
    Create { path: PathBuf, source: io::Error },
}

/// Whether a filesystem survives a crash of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// It has a journal, and the host's disk has the filesystem before it is used.
    Lasting,
    /// It ends with the VM, never grows, and needs neither.
    OfVm,
}

/// Makes an ext4 filesystem on a blank file.
///
/// # Errors
/// See [`FormatError`].
pub(super) async fn ext4(image: &Image, life: Life) -> Result<(), FormatError> {
    // A blank file needs no zeroes for the journal. mke2fs knows by itself that it needs none for the tables of inodes.
    let mut args = vec!["-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0,lazy_journal_init=1"];
    if life == Life::OfVm {
        args.extend(["-O", FEATURES_OF_VM]);
    }
    run(EXT4, &args, image.file()).await?;
    if life == Life::Lasting {
        sync(image.file()).await?;
    }
    tracing::debug!(image = image.number(), "formatted");
    Ok(())
}

/// Makes an ext4 filesystem on a blank file that the guest will encrypt: it consists of nothing but what is written. No
/// part of it relies on the file's zeroes, which the guest does not see. It ends with the VM, and so needs no journal.
///
/// # Errors
/// See [`FormatError`].
pub(super) async fn ext4_to_encrypt(image: &Image) -> Result<(), FormatError> {
    let features = "^has_journal,^resize_inode,metadata_csum";
    let extended = "root_owner=0:0,nodiscard,lazy_itable_init=1";
    // The guest encrypts blocks of this size.
    let args = ["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", features, "-E", extended];
    // Zeroes are written too, instead of holes that are punched (e2fsprogs' lib/ext2fs/unix_io.c).
    run_with(EXT4, &args, image.file(), &[("UNIX_IO_NOZEROOUT", "1")]).await
}

/// Creates and formats the image of a filesystem (ext2, ext3, ext4 or xfs), unless the file exists. It gets its name when
/// it is complete, so that no incomplete one remains.
///
/// # Errors
/// See [`FormatError`].
pub(crate) async fn create(path: &Path, bytes: u64, fs_type: &str, uuid: Option<&str>) -> Result<(), FormatError> {
    let failed = |source: io::Error| FormatError::Create { path: path.to_owned(), source };
    if path.try_exists().map_err(failed)? {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let unnamed = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o640).open(folder);
    let image = unnamed.map_err(failed)?;
    image.set_len(bytes).map_err(failed)?;
    let of_xfs = uuid.map(|uuid| format!("uuid={uuid}"));
    let (program, mut args) = match fs_type {
        "xfs" => ("mkfs.xfs", vec!["-q", "-f"]),
        _ => (EXT4, vec!["-q", "-F", "-t", fs_type]),
    };
    match (&of_xfs, uuid) {
        (Some(uuid), _) if fs_type == "xfs" => args.extend(["-m", uuid]),
        (_, Some(uuid)) => args.extend(["-U", uuid]),
        _ => {}
    }
    run(program, &args, &image).await?;
    sync(&image).await?;
    let unnamed = Image::inherited(image.as_raw_fd());
    match linkat(AT_FDCWD, Path::new(&unnamed), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW) {
        // Another create has been faster.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// Returns when the host's disk has what was written to a file.
async fn sync(image: &File) -> Result<(), FormatError> {
    let written = image.try_clone()?;
    Ok(tokio::task::spawn_blocking(move || written.sync_all()).await.map_err(io::Error::other)??)
}

/// Runs a program on a file, the last argument.
async fn run(program: &str, args: &[&str], image: &File) -> Result<(), FormatError> {
    run_with(program, args, image, &[]).await
}

/// [`run`] with variables of the environment.
async fn run_with(program: &str, args: &[&str], image: &File, env: &[(&str, &str)]) -> Result<(), FormatError> {
    let target = Image::inherited(FIRST_FD);
    let args = args.iter().copied().chain([target.as_str()]).map(Into::into).collect();
    run_in(None, DEADLINE, program, args, env, image).await
}

/// Runs a program that has the file as descriptor [`FIRST_FD`].
pub(super) async fn run_in(
    jail: Option<Jail>,
    within: Duration,
    program: &str,
    args: Vec<OsString>,
    env: &[(&str, &str)],
    image: &File,
) -> Result<(), FormatError> {
    let output = File::from(memfd_create(c"husk-mkfs", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?);
    let launch = Launch {
        program: find(program)?,
        args,
        env: env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        fds: vec![(image.try_clone()?.into(), FIRST_FD)],
        jail,
        output: output.try_clone()?,
        cgroups: Vec::new(),
        leads: false,
    };
    let child = launch.spawn().map_err(|source| FormatError::Start { program: program.to_owned(), source })?;
    let Ok(exit) = tokio::time::timeout(within, child.exited()).await else {
        child.kill();
        return Err(FormatError::Deadline { program: program.to_owned(), within });
    };
    if !exit.0.success() {
        return Err(FormatError::Failed { program: program.to_owned(), exit, output: read(output)? });
    }
    Ok(())
}

/// Where a program of the host is.
///
/// # Errors
/// It is missing.
pub(super) fn find(program: &str) -> Result<PathBuf, FormatError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SBIN.map(PathBuf::from));
    let package = match program {
        "mkfs.xfs" => "xfsprogs",
        "mkfs.erofs" => "erofs-utils",
        _ => "e2fsprogs",
    };
    let missing = || FormatError::Missing { program: program.to_owned(), package };
    folders.map(|folder| folder.join(program)).find(|program| program.is_file()).ok_or_else(missing)
}

fn read(mut output: File) -> io::Result<String> {
    let mut text = Vec::new();
    output.rewind()?;
    output.take(SHOWN).read_to_end(&mut text)?;
    Ok(clean(String::from_utf8_lossy(&text).trim()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_missing_image_is_created_complete_and_an_existing_one_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let uuid = Some("5c0ffee0-0000-4000-8000-000000000001");
        create(&path, 8 << 20, "ext4", uuid).await.unwrap();
        let image = fs::read(&path).unwrap();
        // The superblock's magic number and UUID (kernel, Documentation/filesystems/ext4/super.rst).
        assert_eq!((image.len(), &image[1024 + 0x38..][..2]), (8 << 20, &[0x53, 0xef][..]));
        assert_eq!(image[1024 + 0x68..][..4], [0x5c, 0x0f, 0xfe, 0xe0]);
        fs::write(&path, "kept").unwrap();
        create(&path, 8 << 20, "ext4", uuid).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");

        let error = create(&folder.path().join("small"), 1, "ext4", None).await.unwrap_err().to_string();
        assert!(error.starts_with("mke2fs "), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
