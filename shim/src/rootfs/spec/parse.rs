//! Reads a bundle's `config.json`. A field that this version of the spec's types does not know would be ignored
//! silently, so it is reported as a problem.

use oci_spec::runtime::Spec;
use serde_json::Value;

use super::findings::{SpecProblem, SpecProblems};

/// Reads a spec.
///
/// # Errors
/// When the text is not a spec, or has non-empty fields that husk does not know.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, SpecProblems> {
    let not_a_spec = |e: serde_json::Error| {
        SpecProblems(vec![SpecProblem { field: "spec".into(), value: None, why: e.to_string() }])
    };
    // Must be an object: serde would also accept a list of the fields in their order.
    let given = Value::Object(serde_json::from_slice(json).map_err(not_a_spec)?);
    // Parsed from the bytes again, because only then does an error contain the position.
    let spec: Spec = serde_json::from_slice(json).map_err(not_a_spec)?;
    let understood = serde_json::to_value(&spec).map_err(not_a_spec)?;
    let mut problems = Vec::new();
    compare("", &given, &understood, &mut problems);
    if problems.is_empty() { Ok(spec) } else { Err(SpecProblems(problems)) }
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

fn compare(path: &str, given: &Value, understood: &Value, problems: &mut Vec<SpecProblem>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (name, value) in given.iter().filter(|(_, value)| !is_empty(value)) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match understood.get(name) {
                    Some(understood) => compare(&path, value, understood, problems),
                    None => {
                        let why = "unknown field, which this version of husk cannot apply".into();
                        problems.push(SpecProblem { field: path, value: None, why });
                    }
                }
            }
        }
        // Sets of names may change their order, but their items have no fields that could be lost.
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
    fn every_field_that_ctr_writes_is_known() {
        for json in [include_str!("../testdata/ctr-1.6.json"), include_str!("../testdata/ctr-1.6-privileged.json")] {
            parse(json.as_bytes()).unwrap();
        }
    }

    #[test]
    fn unknown_fields_are_reported_unless_they_are_empty() {
        let table = [
            (r#"{"ociVersion":"1.0.2","quirks":{"a":[0,false,""]},"hostname":""}"#, ""),
            (r#"{"ociVersion":"1.0.2","quirks":{"a":1}}"#, "quirks"),
            (
                r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/a"},{"destination":"/b","speed":9}],"linux":{"x":"y"}}"#,
                "linux.x mounts[1].speed",
            ),
        ];
        for (json, expected) in table {
            let fields = parse(json.as_bytes()).err().map_or(Vec::new(), |SpecProblems(list)| {
                list.into_iter().map(|problem| problem.field).collect::<Vec<_>>()
            });
            assert_eq!(fields.join(" "), expected, "{json}");
        }
        for broken in ["", "{", "[]", r#"{"mounts":7}"#] {
            let error = parse(broken.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("config.json: spec: "), "{error}");
        }
    }
}
