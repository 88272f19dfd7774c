//! What must hold of the guest's texts, wherever they leave the shim.

use serde_json::Value;

use crate::host::text::{LONGEST, is_unsafe};

/// Checks a text that contains the guest's: it commands no terminal, ends no line, and is short.
pub(super) fn harmless(text: &str, most: usize) {
    assert!(!text.contains(is_unsafe), "an unsafe character in {text:?}");
    let length = text.chars().count();
    assert!(length <= most, "{length} characters instead of at most {most}: {text:?}");
}

/// Checks the texts in a JSON value.
pub(super) fn harmless_json(value: &Value) {
    match value {
        Value::String(text) => harmless(text, LONGEST),
        Value::Array(values) => values.iter().for_each(harmless_json),
        Value::Object(fields) => fields.values().for_each(harmless_json),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The names in a line of `name=value` pairs, of which a value may be quoted. Checks that a parser of such lines finds
/// nothing else, and that each value is short.
pub(super) fn names(line: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=').unwrap_or_else(|| panic!("no pair in {rest:?} of {line:?}"));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        assert!(!name.is_empty() && name.chars().all(plain), "the name {name:?} in {line:?}");
        names.push(name);
        let length = if value.starts_with('"') { quoted(value) } else { value.find(' ').unwrap_or(value.len()) };
        let (value, after) = value.split_at(length);
        // Each escaped character counts as one.
        assert!(value.chars().count() <= LONGEST * "\\u{10ffff}".len() + 2, "a long value in {line:?}");
        rest = match after.strip_prefix(' ') {
            Some(next) => next,
            None if after.is_empty() => after,
            None => panic!("{after:?} follows a value in {line:?}"),
        };
    }
    names
}

/// The length of the quoted value at the beginning.
fn quoted(text: &str) -> usize {
    let mut escaped = true;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    panic!("a quote without an end: {text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_a_parser_of_pairs_reads_it() {
        assert_eq!(names(r#"level=info msg="a \"b\" level=error" guest.x=1"#), ["level", "msg", "guest.x"]);
        for forged in ["level=info msg=a b level=error", r#"msg="a" b"#, r#"msg="a"#, "a b=1", r#"msg="a"b=1"#] {
            assert!(std::panic::catch_unwind(|| names(forged)).is_err(), "{forged}");
        }
    }

    #[test]
    fn harmful_text_is_recognised() {
        for (text, most) in [("a\x1b[2J", 100), ("a\nb", 100), ("\u{202e}", 100), ("four", 3)] {
            assert!(std::panic::catch_unwind(|| harmless(text, most)).is_err(), "{text:?}");
        }
        harmless("four", 4);
    }
}
