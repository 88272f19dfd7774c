//! The extras that a sandbox's annotations ask for: files of the host for the guest itself, such as the supervisor agent.

use std::path::PathBuf;

use husk_protos::extras::{FILES_MAX, PATH_MAX, SUPERVISOR, SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE, SUPERVISOR_PID};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::config::names;
use crate::config::problem::Problem;

/// What is the kernel's, and can have no files.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// What is the init's. Of all that is in its folder, only the agent is the user's.
const INITS: [&str; 5] = ["/init", "/run/husk", SUPERVISOR_PID, SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE];
/// Longest name of a file, bytes (NAME_MAX).
const NAME_MAX: usize = 255;
/// Most of a value that an error shows, bytes.
const SHOWN: usize = 200;

/// A file that is to be in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraFile {
    /// Absolute path in the guest.
    pub destination: String,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

/// What a sandbox wants in its guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// Files, in their destinations' order.
    pub files: Vec<ExtraFile>,
    /// Whether the agent is to run, if that was said.
    pub supervisor: Option<bool>,
}

impl Extras {
    fn has_agent(&self) -> bool {
        self.files.iter().any(|file| file.destination == SUPERVISOR)
    }

    /// Whether a guest with these has a supervisor agent that runs.
    pub fn runs_supervisor(&self) -> bool {
        self.supervisor.unwrap_or(true) && self.has_agent()
    }

    /// What is wrong with them as those of a VM that is to be booted.
    pub fn missing(&self) -> Option<Problem> {
        let wrong = self.supervisor == Some(true) && !self.has_agent();
        wrong.then(|| {
            let why = format!("there is no agent: annotation {} has no {SUPERVISOR:?}", names::EXTRAS_FILES);
            supervisor_problem(true, why)
        })
    }

    /// What a container asks for with these that its sandbox's VM, which was booted with `has`, does not have.
    pub fn beyond(&self, has: &Self) -> Vec<Problem> {
        let mut problems: Vec<_> = self
            .files
            .iter()
            .filter(|file| !has.files.contains(file))
            .map(|file| Problem {
                key: entry(&file.destination),
                value: Some(format!("{:?} with mode {:#o}", file.source, file.mode)),
                why: "the sandbox's VM was booted without it, and takes no extras any more".to_owned(),
            })
            .collect();
        if let Some(wanted) = self.supervisor
            && wanted != has.runs_supervisor()
        {
            let with = if wanted { "without" } else { "with" };
            problems.push(supervisor_problem(wanted, format!("the sandbox's VM was booted {with} a supervisor agent")));
        }
        problems
    }
}

pub(crate) fn whole() -> String {
    format!("annotation {}", names::EXTRAS_FILES)
}

fn entry(destination: &str) -> String {
    format!("{}[{:?}]", whole(), cut(destination))
}

pub(crate) fn field(destination: &str, name: &str) -> String {
    format!("{}.{name}", entry(destination))
}

fn supervisor_problem(wanted: bool, why: String) -> Problem {
    Problem { key: format!("annotation {}", names::SUPERVISOR), value: Some(format!("\"{wanted}\"")), why }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(SHOWN)]
}

/// Reads the value of the annotation: a JSON object of destinations, each with `source` and `mode`.
///
/// # Errors
///
/// All that is wrong with it.
pub fn parse(text: &str) -> Result<Vec<ExtraFile>, Vec<Problem>> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let entries = (&mut reader).deserialize_map(Entries).and_then(|entries| reader.end().map(|()| entries));
    let entries = entries.map_err(|error| {
        let why = format!("no JSON object of destinations, each with \"source\" and \"mode\": {error}");
        vec![Problem { key: whole(), value: Some(format!("{:?}", cut(text))), why }]
    })?;
    let (mut files, mut problems) = (Vec::<ExtraFile>::new(), Vec::new());
    if entries.len() > FILES_MAX {
        let value = Some(format!("{} files", entries.len()));
        problems.push(Problem { key: whole(), value, why: format!("at most {FILES_MAX} are possible") });
    }
    for (index, (destination, value)) in entries.iter().enumerate() {
        let wrong = |why: String| Problem { key: entry(destination), value: Some(shown(value)), why };
        let others = entries.iter().map(|(other, _)| other.as_str());
        if let Err(why) = check_destination(destination) {
            problems.push(wrong(why));
        } else if others.clone().take(index).any(|other| other == destination) {
            problems.push(wrong("the destination is there twice".to_owned()));
        } else if let Some(below) = others.clone().find(|other| is_below(other, destination)) {
            problems.push(wrong(format!("it is to be a file, and the folder of {:?} as well", cut(below))));
        }
        match read_entry(destination, value) {
            Ok((source, mode)) => files.push(ExtraFile { destination: destination.clone(), source, mode }),
            Err(wrong) => problems.extend(wrong),
        }
    }
    files.sort_by(|one, other| one.destination.cmp(&other.destination));
    if problems.is_empty() { Ok(files) } else { Err(problems) }
}

fn shown(value: &Value) -> String {
    cut(&value.to_string()).to_owned()
}

fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn check_destination(path: &str) -> Result<(), String> {
    let is_at_or_below = |folder: &&str| path == *folder || is_below(path, folder);
    let Some(parts) = path.strip_prefix('/') else { return Err("the destination must be an absolute path".to_owned()) };
    if parts.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') {
        return Err(
            "the destination must be clean: without \"//\", \".\", \"..\", NUL or a slash at its end".to_owned()
        );
    }
    if path.len() > PATH_MAX || parts.split('/').any(|part| part.len() > NAME_MAX) {
        return Err(format!("the destination may have {PATH_MAX} bytes, and each name in it {NAME_MAX}"));
    }
    if let Some(folder) = KERNELS.iter().find(|folder| is_at_or_below(folder)) {
        return Err(format!("the destination must be outside of {folder}, which is the kernel's"));
    }
    if let Some(taken) = INITS.iter().find(|taken| is_at_or_below(taken) && path != SUPERVISOR) {
        return Err(format!("the destination must not be in {taken}, which is husk's own; {SUPERVISOR:?} may be"));
    }
    if path == "/tmp" || INITS.iter().any(|taken| is_below(taken, path)) {
        return Err("the destination is a folder of the guest".to_owned());
    }
    Ok(())
}

/// The source and the mode of an entry.
fn read_entry(destination: &str, value: &Value) -> Result<(PathBuf, u32), Vec<Problem>> {
    let Some(fields) = value.as_object() else {
        let why = "must be an object with \"source\" and \"mode\"".to_owned();
        return Err(vec![Problem { key: entry(destination), value: Some(shown(value)), why }]);
    };
    let mut problems = Vec::new();
    let mut take = |name: &str, why: &str| {
        let value = fields.get(name).map(shown);
        problems.push(Problem { key: field(destination, name), value, why: why.to_owned() });
    };
    let source = fields.get("source").and_then(Value::as_str).filter(|path| path.starts_with('/'));
    if source.is_none() {
        take("source", "must be an absolute path of the host");
    }
    let mode = fields.get("mode").and_then(Value::as_str).and_then(octal);
    if mode.is_none() {
        take("mode", "must be permission bits as a string of octal digits, \"0777\" at most");
    }
    for unknown in fields.keys().filter(|name| !["source", "mode"].contains(&name.as_str())) {
        take(cut(unknown), "unknown; there are source and mode");
    }
    match (source, mode) {
        (Some(source), Some(mode)) if problems.is_empty() => Ok((source.into(), mode)),
        _ => Err(problems),
    }
}

fn octal(text: &str) -> Option<u32> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
    u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777)
}

/// The entries of an object as they were written: serde_json would keep only the last of those with the same name.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests;
