//! The tests' supervisor agent (`src/bin/agent.rs`), and the two ways to bring it into a VM: on an extras disk or
//! through the annotation.

use std::fs::{File, write};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use husk_protos::extras::{SERIAL, SUPERVISOR};
use husk_shim::config::extras::{ExtraFile, Extras};
use husk_shim::extras::{disk, files};
use serde_json::json;

use crate::vm::{Disk, guest_program};

/// The guest file from which the agent reads its behaviour.
pub const BEHAVIOUR_FILE: &str = "/etc/agent";
/// Kernel parameters of a guest that has the extras disk and runs the agent.
pub const PARAMETERS: &str = "husk.extras=husk-extras husk.supervisor=1";

/// A shell command that sends a request to the agent from a container in the guest's network namespace. It retries
/// because the agent may not be listening yet.
pub fn request(line: &str) -> String {
    format!("for i in $(seq 100); do echo '{line}' | nc 127.0.0.1 7007 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
}

/// Builds the agent's program once and returns its path.
pub fn program() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| guest_program("agent").map_err(|e| format!("{e:?}")));
    built.as_deref().map_err(|e| anyhow!("{e}"))
}

/// An agent with a given behaviour, and other extra files.
pub struct Agent {
    files: Vec<ExtraFile>,
    folder: tempfile::TempDir,
}

impl Agent {
    /// An agent with this behaviour; `src/bin/agent.rs` lists them.
    pub fn new(behaviour: &str) -> Result<Self> {
        // Not executable on the host: husk makes the agent executable.
        let agent = ExtraFile { destination: SUPERVISOR.into(), source: program()?.into(), mode: 0o600 };
        let mut agent = Self { files: vec![agent], folder: tempfile::tempdir()? };
        agent.add(BEHAVIOUR_FILE, behaviour.as_bytes(), 0o644)?;
        Ok(agent)
    }

    /// Adds another extra file.
    pub fn add(&mut self, destination: &str, content: &[u8], mode: u32) -> Result<()> {
        let source = self.folder.path().join(self.files.len().to_string());
        write(&source, content)?;
        self.files.push(ExtraFile { destination: destination.into(), source, mode });
        Ok(())
    }

    /// Puts another file in the place of the agent's program.
    pub fn replace(&mut self, content: &[u8]) -> Result<()> {
        self.files.retain(|file| file.destination != SUPERVISOR);
        self.add(SUPERVISOR, content, 0o600)
    }

    /// The value of the `io.husk.extras.files` annotation.
    pub fn annotation(&self) -> String {
        let entry = |file: &ExtraFile| {
            (file.destination.clone(), json!({"source": file.source, "mode": format!("{:04o}", file.mode)}))
        };
        serde_json::Value::Object(self.files.iter().map(entry).collect()).to_string()
    }

    /// The flags of `ctr run` that add the files.
    pub fn flags(&self) -> [String; 2] {
        ["--annotation".to_owned(), format!("io.husk.extras.files={}", self.annotation())]
    }

    /// The extras disk with these files, as the shim writes it.
    pub fn disk(&self) -> Result<Disk> {
        let extras = Extras { files: self.files.clone(), supervisor: None };
        let sources = files::open(&extras, 64).map_err(|problems| anyhow!("{problems:?}"))?;
        let written = disk::write(&sources)?.context("no disk")?;
        let mut image: File = written.image.try_clone()?;
        let mut content = Vec::new();
        image.rewind()?;
        image.read_to_end(&mut content)?;
        Ok(Disk { serial: SERIAL.into(), content })
    }
}
