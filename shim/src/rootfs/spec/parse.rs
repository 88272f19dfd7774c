//! Reads a bundle's `config.json` without losing anything: a field that this version of the spec's types does not know
//! would silently not be applied, so it is a problem.

use oci_spec::runtime::Spec;
use serde_json::Value;

use crate::rootfs::spec::{Problem, Problems};

/// Reads a spec.
///
/// # Errors
/// When it is not a spec, or has fields, other than empty ones, that husk does not know.
pub fn parse(json: &[u8]) -> Result<Spec, Problems> {
    let not_a_spec =
        |e: serde_json::Error| Problems(vec![Problem { field: "spec".into(), value: None, why: e.to_string() }]);
    // An object, because serde would take a list for the same fields in their order.
    let given = Value::Object(serde_json::from_slice(json).map_err(not_a_spec)?);
    // From the bytes again, because only then the message says where the mistake is.
    let spec: Spec = serde_json::from_slice(json).map_err(not_a_spec)?;
    let understood = serde_json::to_value(&spec).map_err(not_a_spec)?;
    let mut problems = Vec::new();
    compare("", &given, &understood, &mut problems);
    if problems.is_empty() { Ok(spec) } else { Err(Problems(problems)) }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_empty),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

fn compare(path: &str, given: &Value, understood: &Value, problems: &mut Vec<Problem>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (name, value) in given.iter().filter(|(_, value)| !is_empty(value)) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match understood.get(name) {
                    Some(understood) => compare(&path, value, understood, problems),
                    None => {
                        let why = "is not known to this version of husk, so it could not be applied".into();
                        problems.push(Problem { field: path, value: None, why });
                    }
                }
            }
        }
        // Sets of names come back in another order; they have no fields that could be lost.
        (Value::Array(given), Value::Array(understood)) => {
            for (index, (given, understood)) in given.iter().zip(understood).enumerate() {
                compare(&format!("{path}[{index}]"), given, understood, problems);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ctr_writes_is_understood_entirely() {
        for json in [include_str!("../testdata/ctr-1.6.json"), include_str!("../testdata/ctr-1.6-privileged.json")] {
            parse(json.as_bytes()).unwrap();
        }
    }

    #[test]
    fn unknown_fields_are_named_unless_they_are_empty() {
        let table = [
            (r#"{"ociVersion":"1.0.2","quirks":{"a":[0,false,""]},"hostname":""}"#, ""),
            (r#"{"ociVersion":"1.0.2","quirks":{"a":1}}"#, "quirks"),
            (
                r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/a"},{"destination":"/b","speed":9}],"linux":{"x":"y"}}"#,
                "linux.x mounts[1].speed",
            ),
        ];
        for (json, want) in table {
            let fields = parse(json.as_bytes())
                .err()
                .map_or(Vec::new(), |Problems(list)| list.into_iter().map(|problem| problem.field).collect::<Vec<_>>());
            assert_eq!(fields.join(" "), want, "{json}");
        }
        for broken in ["", "{", "[]", r#"{"mounts":7}"#] {
            let error = parse(broken.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("config.json: spec: "), "{error}");
        }
    }
}
