//! The annotations about extras: files of the host for the guest itself, such as the supervisor agent.

use std::path::PathBuf;

use husk_protos::extras::{FILES_MAX, PATH_MAX, SUPERVISOR, SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE, SUPERVISOR_PID};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::config::names;
use crate::config::problem::Problem;

/// Folders of the guest's kernel, which cannot contain extras.
const KERNEL_PATHS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// Files and folders of the guest's init. The user may only place the agent in them.
const INIT_PATHS: [&str; 5] = ["/init", "/run/husk", SUPERVISOR_PID, SUPERVISOR_LOG, SUPERVISOR_LOG_BEFORE];
/// Longest file name, bytes (NAME_MAX of Linux).
const NAME_MAX: usize = 255;
/// An error shows at most this much of a value, bytes.
const SHOWN: usize = 200;

/// A file for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraFile {
    /// Absolute path in the guest.
    pub destination: String,
    /// Absolute path on the host.
    pub source: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

/// The extras of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// The files, sorted by destination.
    pub files: Vec<ExtraFile>,
    /// Whether the agent runs, if the annotation is set.
    pub supervisor: Option<bool>,
}

impl Extras {
    fn has_agent(&self) -> bool {
        self.files.iter().any(|file| file.destination == SUPERVISOR)
    }

    /// Whether a guest with these extras runs a supervisor agent.
    pub(crate) fn runs_supervisor(&self) -> bool {
        self.supervisor.unwrap_or(true) && self.has_agent()
    }

    /// The problem that keeps a VM from booting with these extras: an agent that must run, but is missing.
    pub(crate) fn missing(&self) -> Option<Problem> {
        let missing = self.supervisor == Some(true) && !self.has_agent();
        missing.then(|| {
            let why = format!("there is no agent: annotation {} has no {SUPERVISOR:?}", names::EXTRAS_FILES);
            supervisor_problem(true, why)
        })
    }

    /// The extras of a later container that its sandbox's VM, booted with `present`, lacks.
    pub(crate) fn beyond(&self, present: &Self) -> Vec<Problem> {
        let mut problems: Vec<_> = self
            .files
            .iter()
            .filter(|file| !present.files.contains(file))
            .map(|file| Problem {
                key: entry(&file.destination),
                value: Some(format!("{:?} with mode {:#o}", file.source, file.mode)),
                why: "the sandbox's VM was booted without it, and extras cannot be added later".to_owned(),
            })
            .collect();
        if let Some(requested) = self.supervisor
            && requested != present.runs_supervisor()
        {
            let with = if requested { "without" } else { "with" };
            problems
                .push(supervisor_problem(requested, format!("the sandbox's VM was booted {with} a supervisor agent")));
        }
        problems
    }
}

/// The annotation, as a problem names it.
pub(crate) fn whole() -> String {
    format!("annotation {}", names::EXTRAS_FILES)
}

fn entry(destination: &str) -> String {
    format!("{}[{:?}]", whole(), cut(destination))
}

/// A field of an entry, as a problem names it.
pub(crate) fn field(destination: &str, name: &str) -> String {
    format!("{}.{name}", entry(destination))
}

fn supervisor_problem(requested: bool, why: String) -> Problem {
    Problem { key: format!("annotation {}", names::SUPERVISOR), value: Some(format!("\"{requested}\"")), why }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(SHOWN)]
}

/// Parses the value of the annotation: a JSON object of destinations, each with `source` and `mode`.
///
/// # Errors
///
/// All problems at once.
pub(crate) fn parse(text: &str) -> Result<Vec<ExtraFile>, Vec<Problem>> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let entries = (&mut reader).deserialize_map(Entries).and_then(|entries| reader.end().map(|()| entries));
    let entries = entries.map_err(|error| {
        let why = format!("must be a JSON object of destinations, each with \"source\" and \"mode\": {error}");
        vec![Problem { key: whole(), value: Some(format!("{:?}", cut(text))), why }]
    })?;
    let (mut files, mut problems) = (Vec::<ExtraFile>::new(), Vec::new());
    if entries.len() > FILES_MAX {
        let value = Some(format!("{} files", entries.len()));
        problems.push(Problem { key: whole(), value, why: format!("at most {FILES_MAX} are allowed") });
    }
    for (index, (destination, value)) in entries.iter().enumerate() {
        let problem = |why: String| Problem { key: entry(destination), value: Some(shown(value)), why };
        let others = entries.iter().map(|(other, _)| other.as_str());
        if let Err(why) = check_destination(destination) {
            problems.push(problem(why));
        } else if others.clone().take(index).any(|other| other == destination) {
            problems.push(problem("duplicate destination".to_owned()));
        } else if let Some(below) = others.clone().find(|other| is_below(other, destination)) {
            problems.push(problem(format!("the destination cannot be a file and the folder of {:?}", cut(below))));
        }
        match read_entry(destination, value) {
            Ok((source, mode)) => files.push(ExtraFile { destination: destination.clone(), source, mode }),
            Err(found) => problems.extend(found),
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
        return Err("the destination must be clean: without \"//\", \".\", \"..\", NUL or a trailing slash".to_owned());
    }
    if path.len() > PATH_MAX || parts.split('/').any(|part| part.len() > NAME_MAX) {
        return Err(format!("the destination may have at most {PATH_MAX} bytes, and each name in it {NAME_MAX}"));
    }
    if let Some(folder) = KERNEL_PATHS.iter().find(|folder| is_at_or_below(folder)) {
        return Err(format!("the destination must be outside of {folder}, which belongs to the kernel"));
    }
    if let Some(taken) = INIT_PATHS.iter().find(|taken| is_at_or_below(taken) && path != SUPERVISOR) {
        return Err(format!(
            "the destination must be outside of {taken}, which belongs to husk; only {SUPERVISOR:?} is allowed"
        ));
    }
    if path == "/tmp" || INIT_PATHS.iter().any(|taken| is_below(taken, path)) {
        return Err("the destination is a folder in the guest".to_owned());
    }
    Ok(())
}

/// The source and mode of an entry.
fn read_entry(destination: &str, value: &Value) -> Result<(PathBuf, u32), Vec<Problem>> {
    let Some(fields) = value.as_object() else {
        let why = "must be an object with \"source\" and \"mode\"".to_owned();
        return Err(vec![Problem { key: entry(destination), value: Some(shown(value)), why }]);
    };
    let mut problems = Vec::new();
    let mut reject = |name: &str, why: &str| {
        let value = fields.get(name).map(shown);
        problems.push(Problem { key: field(destination, name), value, why: why.to_owned() });
    };
    let source = fields.get("source").and_then(Value::as_str).filter(|path| path.starts_with('/'));
    if source.is_none() {
        reject("source", "must be an absolute path on the host");
    }
    let mode = fields.get("mode").and_then(Value::as_str).and_then(octal);
    if mode.is_none() {
        reject("mode", "must be permission bits as a string of octal digits, at most \"0777\"");
    }
    for unknown in fields.keys().filter(|name| !["source", "mode"].contains(&name.as_str())) {
        reject(cut(unknown), "unknown field; the fields are source and mode");
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

/// All entries of an object: serde_json's map would keep only the last of several entries with the same name.
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
pub(crate) mod tests;
