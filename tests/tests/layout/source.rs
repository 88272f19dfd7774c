//! Reads the imports and functions of a crate from the syntax trees of its files.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

use crate::graph::Graph;

/// The non-test code of one library or program.
#[derive(Default)]
pub struct Source {
    pub graph: Graph,
    pub functions: Vec<Function>,
}

pub struct Function {
    pub file: PathBuf,
    pub line: usize,
    pub name: String,
    /// From `fn` to the closing brace.
    pub lines: usize,
}

impl Source {
    /// Reads the crate whose root is this file.
    pub fn read(root: &Path) -> Result<Self> {
        let mut modules = Modules::default();
        modules.load(Vec::new(), root, root.parent().context("a file's folder")?)?;
        let mut source = Self::default();
        source.graph.files = modules.files.iter().map(|file| file.module.clone()).collect();
        for (index, file) in modules.files.iter().enumerate() {
            let module = file.module.clone();
            let mut reader = Reader { modules: &modules, index, module, scope: HashMap::new(), source: &mut source };
            reader.enter(&file.items);
        }
        Ok(source)
    }
}

struct File {
    module: Vec<String>,
    path: PathBuf,
    items: Vec<Item>,
}

/// The module tree without test modules.
#[derive(Default)]
struct Modules {
    files: Vec<File>,
    file_of: HashMap<Vec<String>, usize>,
}

impl Modules {
    /// Reads the file of `module`, and those of its children from `folder`.
    fn load(&mut self, module: Vec<String>, path: &Path, folder: &Path) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let items = syn::parse_file(&text).with_context(|| format!("parse {}", path.display()))?.items;
        let file = self.files.len();
        self.files.push(File { module: module.clone(), path: path.to_owned(), items: Vec::new() });
        self.add(&module, &items, folder, file)?;
        self.files[file].items = items;
        Ok(())
    }

    fn add(&mut self, module: &[String], items: &[Item], folder: &Path, file: usize) -> Result<()> {
        self.file_of.insert(module.to_vec(), file);
        for item in items {
            let Item::Mod(child) = item else { continue };
            if is_test(&child.attrs) {
                continue;
            }
            let name = child.ident.to_string();
            let path = [module, std::slice::from_ref(&name)].concat();
            let below = folder.join(&name);
            if let Some((_, items)) = &child.content {
                self.add(&path, items, &below, file)?;
            } else if let Some(named) = path_attribute(&child.attrs) {
                // Relative to this file, and its children are beside it.
                let place = self.files[file].path.with_file_name(named);
                self.load(path, &place, place.parent().context("a file's folder")?)?;
            } else {
                let flat = folder.join(format!("{name}.rs"));
                let place = if flat.is_file() { flat } else { below.join("mod.rs") };
                self.load(path, &place, &below)?;
            }
        }
        Ok(())
    }

    /// The file that a path from the root leads to.
    fn file_at(&self, path: &[String]) -> Option<usize> {
        (0..=path.len()).rev().find_map(|length| self.file_of.get(&path[..length]).copied())
    }
}

/// Collects one file's imports and functions.
struct Reader<'a> {
    modules: &'a Modules,
    index: usize,
    module: Vec<String>,
    /// Names imported by the current module, with the paths that they stand for.
    scope: HashMap<String, Vec<String>>,
    source: &'a mut Source,
}

impl Reader<'_> {
    fn enter(&mut self, items: &[Item]) {
        for item in items {
            if let Item::Use(item) = item
                && !is_test(&item.attrs)
                && item.leading_colon.is_none()
            {
                for (path, name) in flatten(&item.tree) {
                    if let (Some(path), Some(name)) = (self.resolve(&path), name) {
                        self.scope.insert(name, path);
                    }
                }
            }
        }
        items.iter().for_each(|item| self.visit_item(item));
    }

    /// The path from the crate's root, if it is a path of this crate.
    fn resolve(&self, path: &[String]) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let child = [&self.module[..], std::slice::from_ref(first)].concat();
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([&self.module, rest].concat()),
            "super" => {
                let supers = path.iter().take_while(|segment| *segment == "super").count();
                let base = &self.module[..self.module.len().checked_sub(supers)?];
                Some([base, &path[supers..]].concat())
            }
            _ if self.modules.file_of.contains_key(&child) => Some([&child[..], rest].concat()),
            name => Some([self.scope.get(name)?, rest].concat()),
        }
    }

    fn import(&mut self, path: &[String]) {
        let file = self.resolve(path).and_then(|path| self.modules.file_at(&path));
        if let Some(file) = file.filter(|file| *file != self.index) {
            self.source.graph.imports.insert((self.index, file));
        }
    }

    fn function(&mut self, name: &syn::Ident, start: proc_macro2::Span, block: &syn::Block) {
        let (start, end) = (start.start().line, block.brace_token.span.close().end().line);
        let file = self.modules.files[self.index].path.clone();
        self.source.functions.push(Function { file, line: start, name: name.to_string(), lines: end - start + 1 });
    }

    /// syn does not parse a macro's arguments: finds `a::b` among its tokens.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match &token {
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Ident(ident) if colons == 2 && !path.is_empty() => {
                    path.push(ident.to_string());
                    colons = 0;
                }
                other => {
                    self.import_inline(&std::mem::take(&mut path));
                    colons = 0;
                    match other {
                        TokenTree::Ident(ident) => path.push(ident.to_string()),
                        TokenTree::Group(group) => self.tokens(group.stream()),
                        _ => {}
                    }
                }
            }
        }
        self.import_inline(&path);
    }

    /// A name alone is a local item, or was imported by a `use`, which counts already.
    fn import_inline(&mut self, path: &[String]) {
        if path.len() > 1 {
            self.import(path);
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if attributes(item).is_some_and(is_test) {
            return;
        }
        match item {
            Item::Mod(module) => {
                let Some((_, items)) = &module.content else { return };
                self.module.push(module.ident.to_string());
                let scope = std::mem::take(&mut self.scope);
                self.enter(items);
                self.scope = scope;
                self.module.pop();
                return;
            }
            Item::Use(item) if item.leading_colon.is_none() => {
                flatten(&item.tree).iter().for_each(|(path, _)| self.import(path));
            }
            Item::Fn(item) => self.function(&item.sig.ident, item.sig.fn_token.span, &item.block),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test(&item.attrs) {
            self.function(&item.sig.ident, item.sig.fn_token.span, &item.block);
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig.ident, item.sig.fn_token.span, block);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_local(&mut self, local: &'ast syn::Local) {
        if !is_test(&local.attrs) {
            visit::visit_local(self, local);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.import_inline(&segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.tokens(call.tokens.clone());
    }

    // `pub(in crate::a)` and attributes import nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

/// The paths of a use tree, each with the name that it brings into scope.
fn flatten(tree: &UseTree) -> Vec<(Vec<String>, Option<String>)> {
    match tree {
        UseTree::Path(path) => {
            let first = path.ident.to_string();
            let prefixed = |(rest, name): (Vec<String>, Option<String>)| {
                // `use a::{self}` brings in `a`.
                let name = if name.as_deref() == Some("self") { Some(first.clone()) } else { name };
                ([vec![first.clone()], rest].concat(), name)
            };
            flatten(&path.tree).into_iter().map(prefixed).collect()
        }
        UseTree::Name(name) if name.ident == "self" => vec![(Vec::new(), Some("self".to_owned()))],
        UseTree::Name(name) => vec![(vec![name.ident.to_string()], Some(name.ident.to_string()))],
        UseTree::Rename(rename) if rename.ident == "self" => vec![(Vec::new(), Some(rename.rename.to_string()))],
        UseTree::Rename(rename) => vec![(vec![rename.ident.to_string()], Some(rename.rename.to_string()))],
        UseTree::Glob(_) => vec![(Vec::new(), None)],
        UseTree::Group(group) => group.items.iter().flat_map(flatten).collect(),
    }
}

/// The file that `#[path = "…"]` names.
fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
            _ => None,
        },
        _ => None,
    })
}

fn attributes(item: &Item) -> Option<&[Attribute]> {
    Some(match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => return None,
    })
}

/// `#[test]`, `#[tokio::test]`, and any `#[cfg]` that needs `test`.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let path = attribute.path();
        let is_cfg = path.is_ident("cfg");
        let list = attribute.meta.require_list();
        path.segments.last().is_some_and(|segment| segment.ident == "test")
            || is_cfg && list.is_ok_and(|list| needs_test(list.tokens.clone()))
    })
}

fn needs_test(tokens: TokenStream) -> bool {
    let mut negated = false;
    tokens.into_iter().any(|token| match token {
        TokenTree::Ident(ident) => {
            negated = ident == "not";
            ident == "test"
        }
        TokenTree::Group(group) => !negated && needs_test(group.stream()),
        _ => false,
    })
}

#[test]
fn the_check_finds_every_kind_of_import_and_ignores_tests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: &str| -> Result<()> {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().context("a file's folder")?)?;
        Ok(fs::write(path, text)?)
    };
    write("lib.rs", "mod a; mod b; mod c; mod d; mod e; mod f; #[cfg(test)] mod tests;")?;
    // A brace import, an inline path, a child, a macro's tokens, an imported module, and super.
    write("a.rs", "use crate::{b::X as _}; fn f() { crate::c::g() }")?;
    write("b.rs", "pub struct X; fn f() { println!(\"{}\", crate::d::Y); }")?;
    write("c.rs", "use crate::d; fn g() { d::deep::h() }")?;
    write("d/mod.rs", "pub mod deep; pub const Y: u8 = 0; fn f() { deep::h() } pub(in crate::f) fn v() {}")?;
    write("d/deep.rs", "use super::Y; pub fn h() {} #[cfg(test)] mod tests { use crate::a; }")?;
    write("e.rs", "#[cfg(test)] use crate::f; #[test] fn t() { crate::f::x() }")?;
    write("f.rs", "fn x() {\n\n}\n")?;
    write("tests.rs", "use crate::a;")?;
    let source = Source::read(&folder.path().join("lib.rs"))?;
    let name = |file: usize| source.graph.name_of(file);
    let imports: Vec<String> =
        source.graph.imports.iter().map(|(from, to)| format!("{}>{}", name(*from), name(*to))).collect();
    let mut imports: Vec<&str> = imports.iter().map(String::as_str).collect();
    imports.sort_unstable();
    assert_eq!(imports, ["a>b", "a>c", "b>d", "c>d", "c>d::deep", "d::deep>d", "d>d::deep"]);
    let cycles = source.graph.cycles();
    assert_eq!(cycles.files, [["d", "d::deep"]]);
    assert!(cycles.folders.is_empty(), "{:?}", cycles.folders);
    assert_eq!(source.functions.iter().map(|function| function.lines).max(), Some(3));
    Ok(())
}
