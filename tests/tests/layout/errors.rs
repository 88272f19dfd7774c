//! Which error types print a cause that they also return from `source()`: whoever prints the chain would show it twice.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use syn::visit::{self, Visit};
use syn::{Attribute, Fields, ItemEnum, ItemMod, ItemStruct, Meta};

/// The errors of one file.
#[derive(Default)]
pub(crate) struct Errors {
    /// Variants and structs that have a source.
    pub(crate) with_source: usize,
    /// Those that print it as well.
    pub(crate) repeating: Vec<String>,
}

impl Errors {
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let parsed = syn::parse_file(&text).with_context(|| format!("parse {}", file.display()))?;
        let mut errors = Self::default();
        errors.visit_file(&parsed);
        Ok(errors)
    }

    fn check(&mut self, name: &str, attributes: &[Attribute], fields: &Fields) {
        let Some(message) = attributes.iter().find_map(message) else { return };
        let Some(source) = source_of(fields) else { return };
        self.with_source += 1;
        if prints(&message, &source) {
            self.repeating.push(format!("{name}: #[error({message})] prints its source {source}"));
        }
    }
}

impl Visit<'_> for Errors {
    fn visit_item_mod(&mut self, item: &ItemMod) {
        if !item.attrs.iter().any(|attribute| attribute.path().is_ident("cfg") && is_test(attribute)) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_enum(&mut self, item: &ItemEnum) {
        for variant in &item.variants {
            self.check(&format!("{}::{}", item.ident, variant.ident), &variant.attrs, &variant.fields);
        }
        visit::visit_item_enum(self, item);
    }

    fn visit_item_struct(&mut self, item: &ItemStruct) {
        self.check(&item.ident.to_string(), &item.attrs, &item.fields);
        visit::visit_item_struct(self, item);
    }
}

fn is_test(cfg: &Attribute) -> bool {
    matches!(&cfg.meta, Meta::List(list) if list.tokens.to_string() == "test")
}

/// What stands in `#[error(...)]`.
fn message(attribute: &Attribute) -> Option<String> {
    match &attribute.meta {
        Meta::List(list) if list.path.is_ident("error") => Some(list.tokens.to_string()),
        _ => None,
    }
}

/// The field that thiserror returns from `source()`: by its attribute, or by the name `source`.
fn source_of(fields: &Fields) -> Option<String> {
    fields.iter().enumerate().find_map(|(index, field)| {
        let marked = field.attrs.iter().any(|a| a.path().is_ident("source") || a.path().is_ident("from"));
        let name = field.ident.as_ref().map_or_else(|| index.to_string(), |ident| ident.to_string());
        (marked || name == "source").then_some(name)
    })
}

/// Whether the message shows the field, in the format string or as an argument.
fn prints(message: &str, field: &str) -> bool {
    let in_format = [format!("{{{field}}}"), format!("{{{field}:")].iter().any(|part| message.contains(part));
    let arguments = message.rsplit_once('"').map_or(message, |(_, arguments)| arguments);
    // A function of the source, such as a hint for its kind, is not the source.
    let mut shown = arguments.split(',').map(|argument| argument.trim_start_matches(['.', ' ']));
    in_format || shown.any(|argument| argument.split(['.', ' ']).next() == Some(field))
}

#[test]
fn a_source_in_the_message_is_found_in_every_form() {
    let table = [
        (r#"#[error("open {path}: {source}")] struct A { path: String, source: io::Error }"#, 1, 1),
        (r#"#[error("open {path}")] struct A { path: String, source: io::Error }"#, 1, 0),
        (r#"#[error("open: {0}")] struct A(#[source] io::Error);"#, 1, 1),
        (r#"#[error("open: {}", .0)] struct A(#[from] io::Error);"#, 1, 1),
        (r#"#[error("open {what}: {cause:?}")] struct A { what: String, #[source] cause: io::Error }"#, 1, 1),
        (r#"#[error("open {0}")] struct A(String, #[source] io::Error);"#, 1, 0),
        (r#"#[error("mount{}", hint(source))] struct A { source: io::Error }"#, 1, 0),
        (r#"#[error(transparent)] struct A(#[from] io::Error);"#, 1, 0),
        (r#"enum E { #[error("a: {0}")] A(#[from] io::Error), #[error("b: {0}")] B(String) }"#, 1, 1),
    ];
    for (text, with_source, repeating) in table {
        let mut errors = Errors::default();
        match syn::parse_str::<syn::Item>(text) {
            Ok(item) => errors.visit_item(&item),
            Err(error) => panic!("{text}: {error}"),
        }
        assert_eq!((errors.with_source, errors.repeating.len()), (with_source, repeating), "{text}");
    }
}
