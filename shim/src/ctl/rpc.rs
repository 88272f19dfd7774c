//! JSON-RPC 2.0 as husk speaks it (jsonrpc.org/specification): what a line says, and the lines that answer it. Pure.
//!
//! One message a line. Batches are refused, and so are parameters by position: each has its name.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Not JSON.
pub const PARSE_ERROR: i64 = -32700;
/// JSON, but no request.
pub const INVALID_REQUEST: i64 = -32600;
/// There is no such method.
pub const METHOD_NOT_FOUND: i64 = -32601;
/// The method does not take these parameters.
pub const INVALID_PARAMS: i64 = -32602;
/// The method failed through no fault of its caller.
pub const INTERNAL_ERROR: i64 = -32603;
/// The connection is occupied by a streaming call, or there are too many clients.
pub const BUSY: i64 = -32000;
/// What was asked for is somebody else's to do, or not possible as things are; the message says whose, and what would be.
pub const REFUSED: i64 = -32001;

/// The program that is to be run is not there.
pub const NO_SUCH_PROGRAM: i64 = -32002;
/// The program that is to be run is there, and cannot be.
pub const NOT_EXECUTABLE: i64 = -32003;

/// Longest part of what a caller wrote that is repeated to it.
const QUOTED: usize = 128;

/// Why a call is not answered with a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// One of the codes above.
    pub code: i64,
    /// For people.
    pub message: String,
}

impl RpcError {
    /// An error of this code.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// [`REFUSED`], with what to do in its place.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(REFUSED, message)
    }

    /// [`INTERNAL_ERROR`].
    pub fn internal(error: impl std::fmt::Display) -> Self {
        Self::new(INTERNAL_ERROR, error.to_string())
    }
}

/// A message of a caller.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// What the response will bear. Without one it is a notification, and is never answered.
    pub id: Option<Value>,
    /// As it was written.
    pub method: String,
    /// An object; an empty one if there was none.
    pub params: Value,
}

/// Reads a line.
///
/// # Errors
/// The response that it deserves: its id, null where there is none to be found, and the error.
pub fn parse(line: &[u8]) -> Result<Message, (Value, RpcError)> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| (Value::Null, RpcError::new(PARSE_ERROR, format!("this line is not JSON: {error}"))))?;
    let invalid = |id: &Value, why: &str| (id.clone(), RpcError::new(INVALID_REQUEST, why));
    let Value::Object(mut object) = value else {
        let why = if value.is_array() { "batches are not supported: one object a line" } else { "not an object" };
        return Err(invalid(&Value::Null, why));
    };
    let id = object.remove("id");
    let told = match &id {
        None | Some(Value::Null) => Value::Null,
        Some(id @ (Value::String(_) | Value::Number(_))) => id.clone(),
        Some(_) => return Err(invalid(&Value::Null, "id must be a string or a number")),
    };
    if object.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
        return Err(invalid(&told, "jsonrpc must be \"2.0\""));
    }
    let Some(Value::String(method)) = object.remove("method") else {
        return Err(invalid(&told, "method must be a string"));
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => json!({}),
        Some(params @ Value::Object(_)) => params,
        Some(_) if id.is_none() => return Err(invalid(&told, "params must be an object")),
        Some(_) => return Err((told, RpcError::new(INVALID_PARAMS, "params must be an object: they go by name"))),
    };
    Ok(Message { id, method, params })
}

/// The parameters of a method as its own type, which refuses those that it does not know (`deny_unknown_fields`).
///
/// # Errors
/// [`INVALID_PARAMS`], saying which.
pub fn params<T: DeserializeOwned>(params: Value) -> Result<T, RpcError> {
    serde_json::from_value(params).map_err(|error| RpcError::new(INVALID_PARAMS, format!("params: {error}")))
}

/// The line that answers a call.
pub fn response(id: &Value, answer: &Result<Value, RpcError>) -> Vec<u8> {
    line(match answer {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err(error) => {
            json!({"jsonrpc": "2.0", "id": id, "error": {"code": error.code, "message": error.message}})
        }
    })
}

/// A line that is part of a streaming call, before its response.
pub fn notification(method: &str, params: &Value) -> Vec<u8> {
    line(json!({"jsonrpc": "2.0", "method": method, "params": params}))
}

fn line(value: Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// A caller's words as they are repeated in an error.
pub fn quoted(text: &str) -> String {
    let short = &text[..text.floor_char_boundary(QUOTED)];
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_call_or_has_the_error_that_it_deserves() {
        let call = |id: Option<Value>, params: Value| Ok(Message { id, method: "m".into(), params });
        let error = |id: Value, code: i64| Err((id, code));
        type Row = (&'static str, Result<Message, (Value, i64)>);
        let table: &[Row] = &[
            (r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#, call(Some(json!(1)), json!({}))),
            (r#"{"jsonrpc":"2.0","id":"a","method":"m","params":{"x":1}}"#, call(Some(json!("a")), json!({"x": 1}))),
            (r#"{"jsonrpc":"2.0","method":"m"}"#, call(None, json!({}))),
            (r#"{"jsonrpc":"2.0","id":null,"method":"m","params":null}"#, call(Some(Value::Null), json!({}))),
            ("", error(Value::Null, PARSE_ERROR)),
            ("{", error(Value::Null, PARSE_ERROR)),
            (r#"{"jsonrpc":"2.0","id":1,"method":"m"} x"#, error(Value::Null, PARSE_ERROR)),
            ("\u{fffd}", error(Value::Null, PARSE_ERROR)),
            ("7", error(Value::Null, INVALID_REQUEST)),
            (r#"[{"jsonrpc":"2.0","id":1,"method":"m"}]"#, error(Value::Null, INVALID_REQUEST)),
            (r#"{"id":1,"method":"m"}"#, error(json!(1), INVALID_REQUEST)),
            (r#"{"jsonrpc":"1.0","id":1,"method":"m"}"#, error(json!(1), INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1}"#, error(json!(1), INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1,"method":5}"#, error(json!(1), INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":{},"method":"m"}"#, error(Value::Null, INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1,"method":"m","params":[1]}"#, error(json!(1), INVALID_PARAMS)),
            (r#"{"jsonrpc":"2.0","method":"m","params":[1]}"#, error(Value::Null, INVALID_REQUEST)),
        ];
        for (line, wanted) in table {
            let parsed = parse(line.as_bytes()).map_err(|(id, error)| (id, error.code));
            assert_eq!(&parsed, wanted, "{line}");
        }
        // Deep nesting ends the parser, not the process.
        assert_eq!(parse(&b"[".repeat(1 << 20)).unwrap_err().1.code, PARSE_ERROR);
    }

    #[test]
    fn an_answer_is_one_line_whatever_is_in_it() {
        let answers = [
            (Ok(json!({"text": "a\nb"})), r#"{"id":7,"jsonrpc":"2.0","result":{"text":"a\nb"}}"#),
            (
                Err(RpcError::new(REFUSED, "a\nb")),
                r#"{"error":{"code":-32001,"message":"a\nb"},"id":7,"jsonrpc":"2.0"}"#,
            ),
        ];
        for (answer, wanted) in answers {
            assert_eq!(response(&json!(7), &answer), format!("{wanted}\n").into_bytes());
        }
        assert_eq!(quoted(&"ä".repeat(1000)), format!("{:?}", "ä".repeat(64)));
    }
}
