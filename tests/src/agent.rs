//! The supervisor agent of the tests (`src/bin/agent.rs`), and how it gets into a VM: on a disk of its own, or by the annotation.

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

/// Where the agent is told what it does.
pub const WANTED: &str = "/etc/agent";
/// The kernel parameters of a guest that has the disk and runs the agent.
pub const PARAMETERS: &str = "husk.extras=husk-extras husk.supervisor=1";

/// A question to the agent, from a container that shares the guest's network. It may not listen yet.
pub fn question(words: &str) -> String {
    format!("for i in $(seq 100); do echo '{words}' | nc 127.0.0.1 7007 2>/dev/null && exit 0; sleep 0.1; done; exit 1")
}

/// The agent's program.
pub fn program() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| guest_program("agent").map_err(|e| format!("{e:?}")));
    built.as_deref().map_err(|e| anyhow!("{e}"))
}

/// An agent that is told to do something, with other files beside it.
pub struct Agent {
    files: Vec<ExtraFile>,
    folder: tempfile::TempDir,
}

impl Agent {
    /// The one that does `what`.
    pub fn new(what: &str) -> Result<Self> {
        // Not executable: it is made so.
        let agent = ExtraFile { destination: SUPERVISOR.into(), source: program()?.into(), mode: 0o600 };
        let mut agent = Self { files: vec![agent], folder: tempfile::tempdir()? };
        agent.bring(WANTED, what.as_bytes(), 0o644)?;
        Ok(agent)
    }

    /// Brings another file with it.
    pub fn bring(&mut self, destination: &str, content: &[u8], mode: u32) -> Result<()> {
        let source = self.folder.path().join(self.files.len().to_string());
        write(&source, content)?;
        self.files.push(ExtraFile { destination: destination.into(), source, mode });
        Ok(())
    }

    /// Brings something else in the agent's place.
    pub fn replace(&mut self, content: &[u8]) -> Result<()> {
        self.files.retain(|file| file.destination != SUPERVISOR);
        self.bring(SUPERVISOR, content, 0o600)
    }

    /// The value of the annotation.
    pub fn annotation(&self) -> String {
        let entry = |file: &ExtraFile| {
            (file.destination.clone(), json!({"source": file.source, "mode": format!("{:04o}", file.mode)}))
        };
        serde_json::Value::Object(self.files.iter().map(entry).collect()).to_string()
    }

    /// The flags of `ctr run` that bring it.
    pub fn flags(&self) -> [String; 2] {
        ["--annotation".to_owned(), format!("io.husk.extras.files={}", self.annotation())]
    }

    /// The disk with it, as the shim writes it.
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
