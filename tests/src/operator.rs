//! An operator's tools: `husk`, and the sockets of a sandbox.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::artifacts::built;
use crate::command::{self, Output};
use crate::containerd::{Containerd, NAMESPACE};
use crate::process;

/// Deadline for one call of `husk`, and for its effects.
pub const SOON: Duration = Duration::from_secs(60);

/// `husk` for the sandboxes of this containerd.
pub fn command(containerd: &Containerd, args: &[&str]) -> Result<Command> {
    let mut command = containerd.enter(built("husk")?);
    command.args(args);
    Ok(command)
}

/// Runs `husk` until it exits, with any exit code.
pub fn husk(containerd: &Containerd, args: &[&str]) -> Result<Output> {
    command::run(command(containerd, args)?, None, SOON)
}

/// Runs `husk`, which must succeed, and parses its stdout as JSON.
pub fn husk_json(containerd: &Containerd, args: &[&str]) -> Result<Value> {
    let out = husk(containerd, args)?.ok()?;
    serde_json::from_slice(&out.stdout).with_context(|| out.to_string())
}

/// The columns of a sandbox in `husk list`, by title.
pub fn listed(containerd: &Containerd, id: &str) -> Result<HashMap<String, String>> {
    let list = husk(containerd, &["list"])?.ok()?.text();
    let mut lines = list.lines().map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()));
    let titles = lines.next().context("no titles")?;
    let columns = lines.find(|columns| columns.clone().next() == Some(id)).with_context(|| list.clone())?;
    Ok(titles.zip(columns).map(|(title, column)| (title.to_owned(), column.to_owned())).collect())
}

/// The state directory of a sandbox, as the test reaches it.
pub fn folder(containerd: &Containerd, id: &str) -> PathBuf {
    containerd.path("/run/husk").join(NAMESPACE).join(id)
}

/// A `husk` that runs until it is stopped, and its lines.
pub struct Follower {
    child: Child,
    lines: mpsc::Receiver<String>,
    errors: mpsc::Receiver<String>,
}

impl Follower {
    /// Starts `husk`.
    pub fn start(containerd: &Containerd, args: &[&str]) -> Result<Self> {
        let mut command = command(containerd, args)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start husk")?;
        let lines = lines_of(child.stdout.take());
        let errors = lines_of(child.stderr.take());
        Ok(Self { child, lines, errors })
    }

    /// Skips to the next line that contains `needle` and returns it.
    pub fn expect(&self, needle: &str) -> Result<String> {
        let started = Instant::now();
        let mut seen = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(SOON.saturating_sub(started.elapsed())) {
            if line.contains(needle) {
                return Ok(line);
            }
            seen.push(line);
        }
        let errors: Vec<String> = self.errors.try_iter().collect();
        bail!("no {needle:?} within {:?}; stdout: {seen:#?}; stderr: {errors:#?}", started.elapsed())
    }

    /// Waits until `husk` exits and returns its exit code and stderr.
    pub fn finish(mut self) -> Result<(Option<i32>, String)> {
        let status = command::wait_for(SOON, "husk exits", || self.child.try_wait().transpose())??;
        Ok((status.code(), self.errors.iter().collect::<Vec<_>>().join("\n")))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        process::kill_tree(self.child.id() as i32);
        // It is dead or already reaped.
        let _ = self.child.wait();
    }
}

fn lines_of(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in stream.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A raw connection to a sandbox's `ctl.sock`.
pub struct Rpc(BufReader<UnixStream>);

impl Rpc {
    /// Connects.
    pub fn connect(containerd: &Containerd, id: &str) -> Result<Self> {
        let stream = husk_shim::host::socket::connect(&folder(containerd, id), "ctl.sock")?;
        stream.set_read_timeout(Some(SOON))?;
        stream.set_write_timeout(Some(SOON))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends raw bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.get_mut().write_all(bytes).context("write to ctl.sock")
    }

    /// Receives the next line; `None` at the end of the stream.
    pub fn receive(&mut self) -> Result<Option<Value>> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Ok(None),
            // The peer closed the connection with unread data.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            read => {
                read.context("read from ctl.sock")?;
                Ok(Some(serde_json::from_str(&line).with_context(|| line.clone())?))
            }
        }
    }

    /// Calls a method and returns its response, skipping notifications.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        self.send(format!("{request}\n").as_bytes())?;
        loop {
            let message = self.receive()?.context("no response")?;
            if message.get("method").is_none() {
                ensure!(message["id"] == 1 && message["jsonrpc"] == "2.0", "{message}");
                return Ok(message);
            }
        }
    }
}
