//! The layout of the source: imports form no cycles, functions and files stay short, the VMM seam names no VMM, errors
//! print no cause that they return, and documents name files that exist.
//!
//! The import graph has one node per file. An edge is a `use` or an inline path (`crate::`, `super::`, `self::`, a
//! child module, an imported name) that leads to another file. Test code does not count. Run with `-- --nocapture` to
//! see the figures; HUSK_LAYOUT_ROOT selects another checkout to measure.
#![cfg(not(target_env = "musl"))]

mod errors;
mod graph;
mod source;

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use errors::Errors;
use source::Source;

/// Raw lines from `fn` to the closing brace.
const MAX_FUNCTION_LINES: usize = 80;
const MAX_FILE_LINES: usize = 600;

#[test]
fn imports_have_no_cycles() -> Result<()> {
    let mut cycles = Vec::new();
    for (name, source) in sources()? {
        let graph = &source.graph;
        let found = graph.cycles();
        eprintln!(
            "{name}: {} files, {} imports; {} files in {} cycles, {} folder cycles; {} upward imports",
            graph.files.len(),
            graph.imports.len(),
            found.files.iter().map(Vec::len).sum::<usize>(),
            found.files.len(),
            found.folders.len(),
            graph.upward_imports(),
        );
        let listed = |kind: &str, groups: Vec<Vec<String>>| -> Vec<String> {
            groups.iter().map(|group| format!("{name}: {kind} {}", group.join(", "))).collect()
        };
        cycles.extend(listed("files", found.files));
        cycles.extend(listed("folders", found.folders));
    }
    ensure!(cycles.is_empty(), "these import each other in a cycle:\n{}", cycles.join("\n"));
    Ok(())
}

#[test]
fn functions_have_at_most_80_lines() -> Result<()> {
    let mut functions: Vec<_> = sources()?.into_iter().flat_map(|(_, source)| source.functions).collect();
    functions.sort_by_key(|function| Reverse(function.lines));
    let place = |f: &source::Function| format!("  {}:{} {}: {} lines", relative(&f.file), f.line, f.name, f.lines);
    let shown: Vec<String> = functions.iter().map(place).collect();
    eprintln!("{} functions, the longest:\n{}", shown.len(), shown[..shown.len().min(5)].join("\n"));
    let too_long = functions.iter().take_while(|function| function.lines > MAX_FUNCTION_LINES).count();
    ensure!(too_long == 0, "longer than {MAX_FUNCTION_LINES} lines:\n{}", shown[..too_long].join("\n"));
    Ok(())
}

#[test]
fn files_have_at_most_600_lines() -> Result<()> {
    let mut lengths = Vec::new();
    for member in members()? {
        for file in rust_files(&root().join(&member))? {
            lengths.push((fs::read_to_string(&file)?.lines().count(), relative(&file)));
        }
    }
    lengths.sort();
    lengths.dedup();
    lengths.reverse();
    let shown: Vec<String> = lengths.iter().map(|(lines, file)| format!("  {file}: {lines} lines")).collect();
    eprintln!("{} files, the longest:\n{}", lengths.len(), shown[..lengths.len().min(5)].join("\n"));
    let too_long = lengths.iter().take_while(|(lines, _)| *lines > MAX_FILE_LINES).count();
    ensure!(too_long == 0, "longer than {MAX_FILE_LINES} lines:\n{}", shown[..too_long].join("\n"));
    Ok(())
}

#[test]
fn the_vmm_seam_names_no_vmm() -> Result<()> {
    let path = root().join("shim/src/vmm/mod.rs");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let named = text.lines().zip(1..).filter(|(line, _)| line.to_lowercase().contains("qemu"));
    let named: Vec<String> = named.map(|(line, number)| format!("  {number}: {line}")).collect();
    ensure!(named.is_empty(), "{} mentions QEMU:\n{}", relative(&path), named.join("\n"));
    Ok(())
}

#[test]
fn errors_print_no_cause_that_they_also_return() -> Result<()> {
    let (mut with_source, mut repeating) = (0, Vec::new());
    for member in members()? {
        for file in rust_files(&root().join(&member))? {
            let errors = Errors::read(&file)?;
            with_source += errors.with_source;
            repeating.extend(errors.repeating.into_iter().map(|error| format!("  {}: {error}", relative(&file))));
        }
    }
    eprintln!("{with_source} errors have a source");
    ensure!(with_source > 0, "no error with a source was found");
    ensure!(repeating.is_empty(), "these print their source, and return it too:\n{}", repeating.join("\n"));
    Ok(())
}

#[test]
fn files_that_documents_name_exist() -> Result<()> {
    let (mut named, mut missing) = (0, Vec::new());
    let pages = fs::read_dir(root().join("docs")).context("list docs")?;
    let pages: Vec<PathBuf> = pages.map(|page| Ok(page?.path())).collect::<Result<_>>()?;
    let top = ["README.md", "SPECIFICATION.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"];
    for page in top.iter().map(|name| root().join(name)).chain(pages) {
        let text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
        for path in paths_in(&text) {
            named += 1;
            if !root().join(path).exists() {
                missing.push(format!("  {}: {path}", relative(&page)));
            }
        }
    }
    ensure!(named > 0, "the documents name no file");
    ensure!(missing.is_empty(), "these files do not exist:\n{}", missing.join("\n"));
    Ok(())
}

/// The paths in backticks that start with a folder of the source. Those with an upper-case last part are placeholders.
fn paths_in(text: &str) -> impl Iterator<Item = &str> {
    const FOLDERS: [&str; 8] = ["docs/", "init/", "kernel-config/", "protos/", "rootfs/", "setup/", "shim/", "tests/"];
    text.split('`').skip(1).step_by(2).filter(|path| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
        let placeholder = path.split(['/', '.']).any(|part| part == "NAME");
        FOLDERS.iter().any(|folder| path.starts_with(folder)) && path.chars().all(plain) && !placeholder
    })
}

fn root() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned();
    std::env::var_os("HUSK_LAYOUT_ROOT").map_or_else(here, PathBuf::from)
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The folders of the workspace's crates.
fn members() -> Result<Vec<String>> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).context("read the workspace's Cargo.toml")?;
    let list = manifest.split_once("members = [").and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.context("find the workspace's members in Cargo.toml")?;
    Ok(list.split(',').map(|name| name.trim().trim_matches('"').to_owned()).filter(|name| !name.is_empty()).collect())
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// Every library and program of the workspace, with the name of its root file.
fn sources() -> Result<Vec<(String, Source)>> {
    let mut sources = Vec::new();
    for member in members()? {
        let folder = root().join(&member).join("src");
        let mut roots = vec![folder.join("lib.rs"), folder.join("main.rs")];
        if let Ok(programs) = fs::read_dir(folder.join("bin")) {
            for program in programs {
                let path = program?.path();
                roots.push(if path.is_dir() { path.join("main.rs") } else { path });
            }
        }
        for file in roots.iter().filter(|file| file.is_file()) {
            sources.push((relative(file), Source::read(file)?));
        }
    }
    ensure!(!sources.is_empty(), "no source found in {}", root().display());
    Ok(sources)
}
