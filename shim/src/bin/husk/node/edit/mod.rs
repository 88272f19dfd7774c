//! Adds husk to the text of containerd's configuration, and removes it. Pure. Everything else in the text stays as it
//! is, byte for byte: people and other installers edit the file too.
//!
//! | `version` | what is added |
//! |---|---|
//! | 2 | a block between two marks at the end. An import would replace the CRI plugin's whole section in containerd 1 |
//! | 3 and later | a drop-in among the `imports`. containerd 2 merges the sections |

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::node::places::{DROP_IN, SHIM};

const VERSION_2: &str = include_str!("../../../../../../setup/kubernetes/containerd/version-2.toml");
const VERSION_3: &str = include_str!("../../../../../../setup/kubernetes/containerd/version-3.toml");
/// The CRI plugin's table of runtimes, by version.
const RUNTIMES_2: [&str; 4] = ["plugins", "io.containerd.grpc.v1.cri", "containerd", "runtimes"];
const RUNTIMES_3: [&str; 4] = ["plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes"];
/// The runtime's name, which the RuntimeClass refers to.
pub(crate) const NAME: &str = "husk";

const BEGIN: &str = "# begin husk: added by `husk node install`, removed by `husk node uninstall`\n";
/// The same for a file whose last line had no end: it gets one with the block and loses it again.
const BEGIN_AFTER_OPEN_LINE: &str =
    "# begin husk, after a line without end: added by `husk node install`, removed by `husk node uninstall`\n";
const END: &str = "# end husk\n";
/// runc as containerd configures it by default. A list of runtimes replaces the default list in containerd 1.
const DEFAULT_RUNTIME: &str =
    "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n";

/// Who creates a pod's sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sandboxer {
    /// containerd, with a pause container.
    Podsandbox,
    /// The shim, through the Sandbox API of containerd 2.
    Shim,
}

/// Why a configuration cannot be changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum EditError {
    /// containerd would not start with it either.
    #[error("line {line}: {message}")]
    Syntax { line: usize, message: String },
    /// Version 1, or a type that is none.
    #[error(
        "version: {found}: the versions 2 and later are supported; `containerd config migrate` prints the file in the \
         current version"
    )]
    Version { found: String },
    /// The key has another type.
    #[error("imports: expected an array of paths")]
    Imports,
    /// Somebody else has registered the name.
    #[error(
        "plugins.\"{}\".containerd.runtimes.husk: already configured by other means; remove that section first",
        path(*version)[1]
    )]
    Registered { version: i64 },
    /// The block's end is missing.
    #[error(
        "line {line}: husk's block begins here, but its end, {:?}, is missing; remove the block by hand",
        END.trim_end()
    )]
    Unclosed { line: usize },
    /// A section cannot extend an inline table.
    #[error("the runtime cannot be added as a section, because an inline table is in the place of one: {0}")]
    Inline(String),
    /// The Sandbox API needs a later version.
    #[error(
        "version: {found}: the sandboxer \"shim\" needs containerd 2 with version 3 of the configuration or a later one"
    )]
    NoSandboxApi { found: i64 },
}

/// What a node needs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Edited {
    /// The new text of containerd's configuration.
    pub(crate) text: String,
    /// The drop-in, if the configuration imports one.
    pub(crate) drop_in: Option<String>,
}

/// The configuration for a node that has none. Every supported containerd reads version 2, and version 3 adds what only
/// containerd 2 has.
pub(crate) fn initial(sandboxer: Sandboxer) -> &'static str {
    match sandboxer {
        Sandboxer::Podsandbox => "version = 2\n",
        Sandboxer::Shim => "version = 3\n",
    }
}

/// Adds husk, or brings what an earlier installation has added up to date.
pub(crate) fn add(text: &str, sandboxer: Sandboxer) -> Result<Edited, EditError> {
    let bare = remove(text)?;
    let document = parse(&bare)?;
    let version = version(document.get_ref())?;
    if find(document.get_ref(), &path(version)).is_some_and(|runtimes| entry(runtimes, NAME).is_some()) {
        return Err(EditError::Registered { version });
    }
    let edited = if version == 2 {
        if sandboxer == Sandboxer::Shim {
            return Err(EditError::NoSandboxApi { found: version });
        }
        let body = body(find(document.get_ref(), &RUNTIMES_2).is_some());
        Edited { text: with_block(text, &bare, &body)?, drop_in: None }
    } else {
        // The place among the imports is the operator's to choose.
        let imported = imports(parse(text)?.get_ref())?.is_some_and(|imports| imports.own().is_some());
        let text = if imported && block(text)?.is_none() { text.to_owned() } else { import(&bare, &document)? };
        Edited { text, drop_in: Some(drop_in(sandboxer)) }
    };
    parse(&edited.text).map_err(|error| EditError::Inline(error.to_string()))?;
    Ok(edited)
}

/// Removes what [`add`] has added; other text stays.
pub(crate) fn remove(text: &str) -> Result<String, EditError> {
    let text = block(text)?.map_or_else(|| text.to_owned(), |block| without(text, block.whole));
    let document = parse(&text)?;
    let Some(imports) = imports(document.get_ref())? else { return Ok(text) };
    let Some(own) = imports.own() else { return Ok(text) };
    let range = match imports.paths.len() {
        1 => own_line(&text, &imports.span).unwrap_or(own),
        _ => with_separator(&text, own),
    };
    Ok(without(&text, range))
}

/// Whether the text registers a runtime of husk's name.
pub(crate) fn registers(text: &str) -> bool {
    parse(text).is_ok_and(|document| {
        [RUNTIMES_2, RUNTIMES_3]
            .iter()
            .any(|path| find(document.get_ref(), path).is_some_and(|runtimes| entry(runtimes, NAME).is_some()))
    })
}

fn path(version: i64) -> [&'static str; 4] {
    if version == 2 { RUNTIMES_2 } else { RUNTIMES_3 }
}

fn parse(text: &str) -> Result<Spanned<DeTable<'_>>, EditError> {
    DeTable::parse(text).map_err(|error| EditError::Syntax {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}

fn version(document: &DeTable<'_>) -> Result<i64, EditError> {
    let wrong = |found: &str| EditError::Version { found: found.to_owned() };
    let value = entry(document, "version").ok_or_else(|| wrong("missing, which means version 1"))?;
    let number = value.get_ref().as_integer().ok_or_else(|| wrong(value.get_ref().type_str()))?;
    let parsed = i64::from_str_radix(number.as_str(), number.radix());
    parsed.ok().filter(|version| *version >= 2).ok_or_else(|| wrong(number.as_str()))
}

fn entry<'a, 'i>(table: &'a DeTable<'i>, key: &str) -> Option<&'a Spanned<DeValue<'i>>> {
    table.iter().find(|(name, _)| name.get_ref().as_ref() == key).map(|(_, value)| value)
}

fn find<'a, 'i>(document: &'a DeTable<'i>, path: &[&str]) -> Option<&'a DeTable<'i>> {
    path.iter().try_fold(document, |table, key| entry(table, key)?.get_ref().as_table())
}

/// The runtime's section, with the path of the installed shim as its type: containerd 1.6 and the Sandbox API do not
/// evaluate `runtime_path`.
fn section(template: &str) -> String {
    let start = template.find("\n[plugins").map_or(0, |line_end| line_end + 1);
    template[start..].replace("\"io.containerd.husk.v1\"", &format!("\"{SHIM}\""))
}

fn body(has_runtimes: bool) -> String {
    let default = if has_runtimes { "" } else { DEFAULT_RUNTIME };
    format!("{default}{}", section(VERSION_2))
}

/// `text` with this block. `bare` is the text without anything of husk.
fn with_block(text: &str, bare: &str, body: &str) -> Result<String, EditError> {
    if let Some(block) = block(text)?
        && text[block.body.clone()] == *body
        && without(text, block.whole) == bare
    {
        // People may have appended something to it since.
        return Ok(text.to_owned());
    }
    let open = !bare.is_empty() && !bare.ends_with('\n');
    let begin = if open { format!("\n{BEGIN_AFTER_OPEN_LINE}") } else { BEGIN.to_owned() };
    Ok(format!("{bare}{begin}{body}{END}"))
}

/// The places of husk's block in a text.
struct Block {
    whole: Range<usize>,
    body: Range<usize>,
}

fn block(text: &str) -> Result<Option<Block>, EditError> {
    let at_line =
        |mark: &str| text.match_indices(mark).map(|(at, _)| at).find(|at| *at == 0 || text.as_bytes()[at - 1] == b'\n');
    let (start, body, open) = match (at_line(BEGIN), at_line(BEGIN_AFTER_OPEN_LINE)) {
        (Some(at), _) => (at, at + BEGIN.len(), false),
        (None, Some(at)) => (at, at + BEGIN_AFTER_OPEN_LINE.len(), true),
        (None, None) => return Ok(None),
    };
    let length = text[body..].find(END).ok_or(EditError::Unclosed { line: line_of(text, start) })?;
    let end = body + length + END.len();
    // The line end before the block belongs to it, unless it separates what follows now.
    let start = if open && end == text.len() { start.saturating_sub(1) } else { start };
    Ok(Some(Block { whole: start..end, body: body..body + length }))
}

fn without(text: &str, range: Range<usize>) -> String {
    [&text[..range.start], &text[range.end..]].concat()
}

/// The `imports` of a configuration, with their places in its text.
struct Imports {
    span: Range<usize>,
    paths: Vec<(String, Range<usize>)>,
}

impl Imports {
    /// The place of husk's drop-in.
    fn own(&self) -> Option<Range<usize>> {
        self.paths.iter().find(|(path, _)| path == DROP_IN).map(|(_, span)| span.clone())
    }
}

fn imports(document: &DeTable<'_>) -> Result<Option<Imports>, EditError> {
    let Some(value) = entry(document, "imports") else { return Ok(None) };
    let array = value.get_ref().as_array().ok_or(EditError::Imports)?;
    let path = |item: &Spanned<DeValue<'_>>| -> Result<(String, Range<usize>), EditError> {
        let text = item.get_ref().as_str().ok_or(EditError::Imports)?;
        Ok((text.to_owned(), item.span()))
    };
    Ok(Some(Imports { span: value.span(), paths: array.iter().map(path).collect::<Result<_, _>>()? }))
}

/// The line of a file that had no imports.
fn import_line() -> String {
    format!("imports = [\"{DROP_IN}\"] # husk")
}

fn import(bare: &str, document: &Spanned<DeTable<'_>>) -> Result<String, EditError> {
    let (at, added) = match imports(document.get_ref())? {
        Some(imports) if imports.paths.is_empty() => (imports.span.start + 1, format!("\"{DROP_IN}\"")),
        Some(imports) => (imports.span.start + 1, format!("\"{DROP_IN}\", ")),
        None => {
            // After the version, which is among the keys that precede all sections.
            let version = entry(document.get_ref(), "version").map_or(0, |value| value.span().end);
            match bare[version..].find('\n') {
                Some(end) => (version + end + 1, format!("{}\n", import_line())),
                None => (bare.len(), format!("\n{}", import_line())),
            }
        }
    };
    Ok([&bare[..at], &added, &bare[at..]].concat())
}

/// The whole line around these imports, with one line end, if it is the one that [`import`] adds.
fn own_line(text: &str, imports: &Range<usize>) -> Option<Range<usize>> {
    let start = text[..imports.start].rfind('\n').map_or(0, |at| at + 1);
    let end = text[imports.end..].find('\n').map_or(text.len(), |at| imports.end + at);
    if text[start..end] != import_line() {
        None
    } else if end < text.len() {
        Some(start..end + 1)
    } else {
        Some(start.saturating_sub(1)..end)
    }
}

/// An element among others, with one of the commas around it.
fn with_separator(text: &str, own: Range<usize>) -> Range<usize> {
    let after = &text[own.end..];
    if let Some(rest) = after.trim_start().strip_prefix(',') {
        let comma = text.len() - rest.len();
        return own.start..comma + usize::from(rest.starts_with(' '));
    }
    // The last one: the comma before it separates it from the others.
    let before = text[..own.start].trim_end();
    if before.ends_with(',') { before.len() - 1..own.end } else { own }
}

/// The drop-in's text.
fn drop_in(sandboxer: Sandboxer) -> String {
    let section = section(VERSION_3);
    let section = match sandboxer {
        Sandboxer::Podsandbox => section,
        Sandboxer::Shim => section.replace("sandboxer = \"podsandbox\"", "sandboxer = \"shim\""),
    };
    format!("# Written by `husk node install`, which replaces changes.\nversion = 3\n\n{section}")
}

#[cfg(test)]
mod tests;
