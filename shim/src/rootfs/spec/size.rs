//! The size of a spec: the guest receives it in one message.

use oci_spec::runtime::Spec;
use serde_json::Value;

use super::findings::Findings;

/// Maximum size of a spec in bytes: ttrpc's maximum size of a message (4 MiB), less room for the rest of the message.
const LIMIT: usize = (4 << 20) - 4096;

/// Rejects a spec that does not fit in a message, by its largest field.
pub(super) fn check_size(spec: &Spec, findings: &mut Findings) {
    let Ok(value) = serde_json::to_value(spec) else { return };
    let size = length(&value);
    if size > LIMIT {
        let (field, length) = largest("", &value, size);
        let field = if field.is_empty() { "spec".to_owned() } else { field };
        findings.reject(field, None, format!("has {length} bytes of a spec of {size}, which may have {LIMIT}"));
    }
}

fn length(value: &Value) -> usize {
    value.to_string().len()
}

/// Path and size of the innermost field that makes up more than half of the spec.
fn largest(path: &str, value: &Value, size: usize) -> (String, usize) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => {
            let separator = if path.is_empty() { "" } else { "." };
            fields.iter().map(|(name, value)| (format!("{path}{separator}{name}"), value)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(n, value)| (format!("{path}[{n}]"), value)).collect(),
        _ => Vec::new(),
    };
    let child =
        children.into_iter().map(|(path, value)| (length(value), path, value)).max_by_key(|(length, ..)| *length);
    match child {
        Some((length, path, value)) if length > size / 2 => largest(&path, value, size),
        _ => (path.to_owned(), length(value)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spec_beyond_the_limit_is_rejected_by_its_largest_field() {
        let text = |length| "x".repeat(length);
        let many: Vec<String> = (0..100).map(|_| text(50_000)).collect();
        let table = [
            (json!({"annotations": {"small": text(4_000_000)}}), None),
            (
                json!({"annotations": {"a": "b", "large": text(4_200_000)}}),
                Some("annotations.large: has 4200002 bytes"),
            ),
            (
                json!({"process": {"user": {}, "cwd": "/", "args": ["a", text(5_000_000)]}}),
                Some("process.args[1]: has 5000002"),
            ),
            (
                json!({"process": {"user": {}, "cwd": "/", "env": many}}),
                Some("process.env: has 5000301 bytes of a spec of 50"),
            ),
        ];
        for (mut spec, expected) in table {
            spec["ociVersion"] = json!("1.2.0");
            let mut findings = Findings::default();
            check_size(&serde_json::from_value(spec).unwrap(), &mut findings);
            let found = findings.problems.first().map(ToString::to_string);
            match (&found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) if found.starts_with(expected) => {}
                _ => panic!("{found:?}, expected {expected:?}"),
            }
        }
    }
}
