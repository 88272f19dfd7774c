//! Files that the sandbox gives its containers: those of a pod that the Sandbox API manages, and the `resolv.conf` of a
//! container in user mode.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::network::user::resolv_conf;
use crate::prepare::{PodFile, Prepared, RESOLV_CONF};
use crate::rootfs::spec::Rewritten;
use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::Sandbox;
use crate::state::{Owner, Step};

impl Sandbox {
    /// Writes the files of the pod, which all its containers share.
    pub(super) fn write_pod_files(&self, files: &[PodFile]) -> Result<(), SandboxError> {
        let owner = Owner::Sandbox;
        files.iter().try_for_each(|file| self.write_file(&owner, self.pod_file(file), &file.content, file.destination))
    }

    /// Gives a container the pod's files, or a `resolv.conf` in user mode, unless its spec mounts others.
    pub(super) fn add_files(&self, id: &str, prepared: &mut Prepared) -> Result<(), SandboxError> {
        let files = self.lock().managed.as_ref().map(|managed| managed.files.clone()).unwrap_or_default();
        for file in files.iter().filter(|file| !mounts(&prepared.rewritten, file.destination)).collect::<Vec<_>>() {
            prepared.rewritten.add_file(self.pod_file(file), Path::new(file.destination));
        }
        if files.is_empty() && prepared.user.is_some() && !mounts(&prepared.rewritten, RESOLV_CONF) {
            let text = resolv_conf()
                .map_err(|error| SandboxError::Internal(format!("read the host's {RESOLV_CONF}: {error}")))?;
            let path = self.journal.dir().join(format!("{id}.resolv.conf"));
            self.write_file(&Owner::Container(id.to_owned()), path.clone(), text.as_bytes(), RESOLV_CONF)?;
            prepared.rewritten.add_file(path, Path::new(RESOLV_CONF));
        }
        Ok(())
    }

    fn pod_file(&self, file: &PodFile) -> PathBuf {
        self.journal.dir().join(format!("pod{}", file.destination.replace('/', ".")))
    }

    fn write_file(&self, owner: &Owner, path: PathBuf, content: &[u8], what: &str) -> Result<(), SandboxError> {
        self.journal.record(owner, [Step::File { path: path.clone() }])?;
        let written = OpenOptions::new().write(true).create_new(true).open(&path).and_then(|mut file| {
            // Every user in the container reads the file. On the host, the sandbox's folder protects it.
            file.set_permissions(Permissions::from_mode(0o644))?;
            file.write_all(content)
        });
        written.map_err(|error| SandboxError::Internal(format!("write the containers' {what}: {error}")))
    }
}

fn mounts(rewritten: &Rewritten, path: &str) -> bool {
    rewritten.mounts_any(&["/etc", path])
}
