//! JSON-RPC 2.0 as husk uses it (jsonrpc.org/specification): the messages, and the errors. Pure.
//!
//! A line holds one message. Batches and parameters by position are rejected.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The line is not JSON.
pub(super) const PARSE_ERROR: i64 = -32700;
/// The line is JSON, but not a request.
pub(super) const INVALID_REQUEST: i64 = -32600;
/// The method does not exist.
pub(super) const METHOD_NOT_FOUND: i64 = -32601;
/// The method does not accept these parameters.
pub(super) const INVALID_PARAMS: i64 = -32602;
/// The method failed through no fault of the caller.
pub(super) const INTERNAL_ERROR: i64 = -32603;
/// A streaming call occupies the connection, or there are too many clients.
pub const BUSY: i64 = -32000;
/// Another program is responsible, or the sandbox's state does not permit it. The message says what to do instead.
pub(super) const REFUSED: i64 = -32001;
/// The program to run does not exist.
pub const NO_SUCH_PROGRAM: i64 = -32002;
/// The program to run exists, but cannot be executed.
pub const NOT_EXECUTABLE: i64 = -32003;

const VERSION: &str = "2.0";
/// Longest part of a caller's text that an error repeats, bytes.
const QUOTED: usize = 128;

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// One of the codes above.
    #[serde(default)]
    pub code: i64,
    /// For people.
    #[serde(default = "no_reason")]
    pub message: String,
}

fn no_reason() -> String {
    "the shim gave no reason".to_owned()
}

impl RpcError {
    pub(super) fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// [`REFUSED`]; the message says what to do instead.
    pub(super) fn refused(message: impl Into<String>) -> Self {
        Self::new(REFUSED, message)
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(INTERNAL_ERROR, message)
    }
}

/// A message from a client.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Message {
    /// Repeated in the response. A message without an id is a notification and is never answered.
    pub(super) id: Option<Value>,
    /// As the client wrote it.
    pub(super) method: String,
    /// An object; empty if the message has none.
    pub(super) params: Value,
}

/// Reads a line from a client.
///
/// # Errors
/// The id and the error of the response. The id is null if the line has no valid one.
pub(super) fn parse(line: &[u8]) -> Result<Message, (Value, RpcError)> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| (Value::Null, RpcError::new(PARSE_ERROR, format!("this line is not JSON: {error}"))))?;
    let invalid = |id: &Value, why: &str| (id.clone(), RpcError::new(INVALID_REQUEST, why));
    let Value::Object(mut object) = value else {
        let why = if value.is_array() { "batches are not supported: send one object a line" } else { "not an object" };
        return Err(invalid(&Value::Null, why));
    };
    let id = object.remove("id");
    let response_id = match &id {
        None | Some(Value::Null) => Value::Null,
        Some(id @ (Value::String(_) | Value::Number(_))) => id.clone(),
        Some(_) => return Err(invalid(&Value::Null, "id must be a string or a number")),
    };
    if object.get("jsonrpc").and_then(Value::as_str) != Some(VERSION) {
        return Err(invalid(&response_id, "jsonrpc must be \"2.0\""));
    }
    let Some(Value::String(method)) = object.remove("method") else {
        return Err(invalid(&response_id, "method must be a string"));
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => json!({}),
        Some(params @ Value::Object(_)) => params,
        Some(_) if id.is_none() => return Err(invalid(&response_id, "params must be an object")),
        Some(_) => {
            let error = RpcError::new(INVALID_PARAMS, "params must be an object, with each parameter by name");
            return Err((response_id, error));
        }
    };
    Ok(Message { id, method, params })
}

/// Reads a method's parameters. Their type rejects unknown ones (`deny_unknown_fields`).
///
/// # Errors
/// [`INVALID_PARAMS`], with the name.
pub(super) fn params<T: DeserializeOwned>(params: Value) -> Result<T, RpcError> {
    serde_json::from_value(params).map_err(|error| RpcError::new(INVALID_PARAMS, format!("params: {error}")))
}

/// A method's result as JSON.
///
/// # Errors
/// [`INTERNAL_ERROR`] if it has no JSON, such as a path that is not UTF-8.
pub(super) fn result(result: impl Serialize) -> Result<Value, RpcError> {
    serde_json::to_value(result).map_err(|error| RpcError::internal(format!("encode the result: {error}")))
}

/// The line that answers a call.
pub(super) fn response(id: &Value, answer: &Result<Value, RpcError>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Response<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a RpcError>,
        id: &'a Value,
        jsonrpc: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        result: Option<&'a Value>,
    }
    let (result, error) = match answer {
        Ok(result) => (Some(result), None),
        Err(error) => (None, Some(error)),
    };
    line(&Response { error, id, jsonrpc: VERSION, result })
}

/// The line that calls a method.
pub fn request(id: u64, method: &str, params: &impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Request<'a, T> {
        id: u64,
        jsonrpc: &'static str,
        method: &'a str,
        params: &'a T,
    }
    line(&Request { id, jsonrpc: VERSION, method, params })
}

/// A line that belongs to a streaming call, in either direction.
pub fn notification(method: &str, params: &impl Serialize) -> Vec<u8> {
    #[derive(Serialize)]
    struct Notification<'a, T> {
        jsonrpc: &'static str,
        method: &'a str,
        params: &'a T,
    }
    line(&Notification { jsonrpc: VERSION, method, params })
}

fn line(message: &impl Serialize) -> Vec<u8> {
    // Cannot fail: the messages consist of strings, numbers, and maps with string keys.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A line from the shim.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The parameters of a notification, which precedes the response.
    Notification(Value),
    /// The response.
    Response(Result<Value, RpcError>),
}

/// Reads a line from the shim.
///
/// # Errors
/// If the line is not a JSON object.
pub fn reply(line: &[u8]) -> Result<Reply, serde_json::Error> {
    #[derive(Deserialize)]
    struct Line {
        method: Option<IgnoredAny>,
        #[serde(default)]
        params: Value,
        error: Option<RpcError>,
        #[serde(default)]
        result: Value,
    }
    let line: Line = serde_json::from_slice(line)?;
    Ok(match line {
        Line { method: Some(_), params, .. } => Reply::Notification(params),
        Line { error: Some(error), .. } => Reply::Response(Err(error)),
        Line { result, .. } => Reply::Response(Ok(result)),
    })
}

/// A caller's text, shortened, for an error message.
pub(super) fn quoted(text: &str) -> String {
    let short = &text[..text.floor_char_boundary(QUOTED)];
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_call_or_is_answered_with_a_specific_error() {
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
        for (line, expected) in table {
            let parsed = parse(line.as_bytes()).map_err(|(id, error)| (id, error.code));
            assert_eq!(&parsed, expected, "{line}");
        }
        // Deep nesting is an error and does not overflow the stack.
        assert_eq!(parse(&b"[".repeat(1 << 20)).unwrap_err().1.code, PARSE_ERROR);
    }

    #[test]
    fn a_response_is_one_line_whatever_it_contains() {
        let answers = [
            (Ok(json!({"text": "a\nb"})), r#"{"id":7,"jsonrpc":"2.0","result":{"text":"a\nb"}}"#),
            (
                Err(RpcError::new(REFUSED, "a\nb")),
                r#"{"error":{"code":-32001,"message":"a\nb"},"id":7,"jsonrpc":"2.0"}"#,
            ),
        ];
        for (answer, expected) in answers {
            assert_eq!(response(&json!(7), &answer), format!("{expected}\n").into_bytes());
        }
        assert_eq!(quoted(&"ä".repeat(1000)), format!("{:?}", "ä".repeat(64)));
    }

    #[test]
    fn a_line_from_the_shim_is_a_notification_a_result_or_an_error() {
        let table = [
            (r#"{"jsonrpc":"2.0","method":"m","params":{"x":1}}"#, Reply::Notification(json!({"x": 1}))),
            (r#"{"jsonrpc":"2.0","method":"m"}"#, Reply::Notification(Value::Null)),
            (r#"{"jsonrpc":"2.0","id":1,"result":{"x":1},"new":2}"#, Reply::Response(Ok(json!({"x": 1})))),
            (r#"{"jsonrpc":"2.0","id":1}"#, Reply::Response(Ok(Value::Null))),
            (
                r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"busy","data":1}}"#,
                Reply::Response(Err(RpcError::new(BUSY, "busy"))),
            ),
            (r#"{"error":{}}"#, Reply::Response(Err(RpcError::new(0, "the shim gave no reason")))),
        ];
        for (line, expected) in table {
            assert_eq!(reply(line.as_bytes()).unwrap(), expected, "{line}");
        }
        assert!(reply(b"7").is_err() && reply(b"").is_err());
        let line = request(7, "m", &json!({"a": "b\n"}));
        assert_eq!(line, b"{\"id\":7,\"jsonrpc\":\"2.0\",\"method\":\"m\",\"params\":{\"a\":\"b\\n\"}}\n");
    }
}
