//! Reads a bundle's `config.json`. As the runtime spec demands, unknown fields and capabilities cause no error: they are
//! left out, and named for the log.

use oci_spec::runtime::{Capability, Spec};
use serde::Deserialize;
use serde_json::Value;

use super::findings::{SpecProblem, SpecProblems};

/// A spec, and what was left out of it.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) spec: Spec,
    pub(crate) ignored: Vec<String>,
}

/// Reads a spec.
///
/// # Errors
/// When the text is not a spec.
pub(crate) fn parse(json: &[u8]) -> Result<Parsed, SpecProblems> {
    let not_a_spec = |e: serde_json::Error| {
        SpecProblems(vec![SpecProblem { field: "spec".into(), value: None, why: e.to_string() }])
    };
    // Must be an object: serde would also accept a list of the fields in their order.
    let mut given = Value::Object(serde_json::from_slice(json).map_err(not_a_spec)?);
    let mut ignored = given.get_mut("process").map(remove_unknown_capabilities).unwrap_or_default();
    // If nothing was removed, from the bytes again: only then does an error contain the position.
    let spec: Spec = if ignored.is_empty() { serde_json::from_slice(json) } else { Spec::deserialize(&given) }
        .map_err(not_a_spec)?;
    let understood = serde_json::to_value(&spec).map_err(not_a_spec)?;
    compare("", &given, &understood, &mut ignored);
    Ok(Parsed { spec, ignored })
}

/// Reads the process of an exec. Returns its JSON without unknown capabilities and CPUs of the host if it has any, and
/// their names.
///
/// # Errors
/// When the text is not JSON.
pub(crate) fn parse_exec(json: &[u8]) -> serde_json::Result<Option<(Vec<u8>, Vec<String>)>> {
    let mut process: Value = serde_json::from_slice(json)?;
    let mut ignored = remove_unknown_capabilities(&mut process);
    if process
        .as_object_mut()
        .and_then(|process| process.remove("execCPUAffinity"))
        .is_some_and(|cpus| !is_empty(&cpus))
    {
        ignored.push("process.execCPUAffinity: CPUs of the host, which are not the VM's".to_owned());
    }
    if ignored.is_empty() { Ok(None) } else { Ok(Some((serde_json::to_vec(&process)?, ignored))) }
}

/// Removes the capabilities that husk's guest does not have, such as those of a newer kernel. Returns their names.
fn remove_unknown_capabilities(process: &mut Value) -> Vec<String> {
    let mut removed = Vec::new();
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    for (set, names) in sets.into_iter().flatten() {
        let Value::Array(names) = names else { continue };
        names.retain(|name| {
            // Anything but a name is an error.
            let unknown = name.is_string() && Capability::deserialize(name).is_err();
            if unknown {
                removed.push(format!("process.capabilities.{set}: unknown capability {name}"));
            }
            !unknown
        });
    }
    removed
}

/// Whether a value sets nothing.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_empty),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

/// Collects the fields that are given, but not understood.
pub(super) fn compare(path: &str, given: &Value, understood: &Value, unknown: &mut Vec<String>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (name, value) in given.iter().filter(|(_, value)| !is_empty(value)) {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match understood.get(name) {
                    Some(understood) => compare(&path, value, understood, unknown),
                    None => unknown.push(format!("{path}: unknown field")),
                }
            }
        }
        // Sets of names may change their order, but their items have no fields that could be lost.
        (Value::Array(given), Value::Array(understood)) => {
            for (index, (given, understood)) in given.iter().zip(understood).enumerate() {
                compare(&format!("{path}[{index}]"), given, understood, unknown);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_field_that_ctr_writes_is_known() {
        for json in [include_str!("../testdata/ctr-1.6.json"), include_str!("../testdata/ctr-1.6-privileged.json")] {
            assert_eq!(parse(json.as_bytes()).unwrap().ignored, Vec::<String>::new());
        }
    }

    #[test]
    fn unknown_fields_are_named_unless_they_are_empty() {
        let table = [
            (r#"{"ociVersion":"1.0.2","quirks":{"a":[0,false,""]},"hostname":""}"#, ""),
            (r#"{"ociVersion":"1.0.2","quirks":{"a":1}}"#, "quirks: unknown field"),
            (
                r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/a"},{"destination":"/b","speed":9}],"linux":{"x":"y"}}"#,
                "linux.x: unknown field, mounts[1].speed: unknown field",
            ),
        ];
        for (json, expected) in table {
            assert_eq!(parse(json.as_bytes()).unwrap().ignored.join(", "), expected, "{json}");
        }
        for broken in ["", "{", "[]", r#"{"mounts":7}"#] {
            let error = parse(broken.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("config.json: spec: "), "{error}");
        }
    }

    #[test]
    fn unknown_capabilities_are_left_out_and_named() {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL", "CAP_FUTURE"], "effective": ["CAP_KILL"], "ambient": ["CAP_LATER"]}
        });
        let parsed = parse(&serde_json::to_vec(&json!({"ociVersion": "1.2.0", "process": process})).unwrap()).unwrap();
        let capabilities = serde_json::to_value(parsed.spec.process().as_ref().unwrap().capabilities()).unwrap();
        assert_eq!((&capabilities["bounding"], &capabilities["ambient"]), (&json!(["CAP_KILL"]), &json!([])));
        let mut expected = [
            r#"process.capabilities.ambient: unknown capability "CAP_LATER""#,
            r#"process.capabilities.bounding: unknown capability "CAP_FUTURE""#,
        ];
        expected.sort_unstable();
        assert_eq!(parsed.ignored, expected);

        let (exec, ignored) = parse_exec(&serde_json::to_vec(&process).unwrap()).unwrap().unwrap();
        let exec: Value = serde_json::from_slice(&exec).unwrap();
        assert_eq!((&exec["capabilities"], ignored), (&capabilities, parsed.ignored));
        assert!(parse_exec(br#"{"capabilities": {"bounding": ["CAP_KILL"]}}"#).unwrap().is_none());
        let (exec, ignored) = parse_exec(br#"{"cwd": "/", "execCPUAffinity": {"initial": "3"}}"#).unwrap().unwrap();
        assert_eq!((exec.as_slice(), ignored.len()), (br#"{"cwd":"/"}"#.as_slice(), 1));
        assert!(parse_exec(br#"{"capabilities"#).is_err());
    }
}
