//! The server with the tests' own methods.

use std::time::Instant;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use crate::ctl::limits::{Limits, SOCKET};
use crate::ctl::method::{Answer, Call, Kind, Method, Param};
use crate::ctl::{rpc, serve};

const SHORT: Duration = Duration::from_millis(200);
const LONG: Duration = Duration::from_secs(20);

static METHODS: &[Method<u32>] = &[
    Method {
        name: "compute.vm.number",
        summary: "Returns the context",
        params: &[],
        result: "a number",
        kind: Kind::Unary(|context, _| Box::pin(async move { Ok(json!(context)) })),
    },
    Method {
        name: "compute.vm.never",
        summary: "Never returns",
        params: &[],
        result: "none",
        kind: Kind::Unary(|_, _| Box::pin(std::future::pending())),
    },
    Method {
        name: "compute.vm.panic",
        summary: "Panics",
        params: &[],
        result: "none",
        kind: Kind::Unary(|_, _| Box::pin(async { panic!("on purpose") })),
    },
    Method {
        name: "compute.vm.stop",
        summary: "Refused",
        params: &[],
        result: "none",
        kind: Kind::Refused("another program does that"),
    },
    Method {
        name: "compute.vm.echo",
        summary: "Repeats the text that it receives",
        params: &[Param { name: "text", kind: "string", required: true, summary: "the first text" }],
        result: "the number of notes",
        kind: Kind::Streaming { notifications: "{text}", run: |_, call| Box::pin(echo(call)) },
    },
    Method {
        name: "compute.vm.flood",
        summary: "Sends forever",
        params: &[],
        result: "none",
        kind: Kind::Streaming { notifications: "{text}", run: |_, call| Box::pin(flood(call)) },
    },
];

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Echo {
    text: String,
}

async fn echo(mut call: Call) -> Answer {
    let Echo { text } = rpc::params(std::mem::take(&mut call.params))?;
    call.notify(&json!({"text": text})).await?;
    let mut notes = 0;
    while let Some(note) = call.note().await {
        if note.method == "echo.end" {
            break;
        }
        notes += 1;
        call.notify(&note.params).await?;
    }
    Ok(json!(notes))
}

async fn flood(call: Call) -> Answer {
    loop {
        call.notify(&json!({"text": "x".repeat(10_000)})).await?;
    }
}

struct Connection(BufReader<UnixStream>);

impl Connection {
    async fn send(&mut self, line: &str) {
        self.0.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    async fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        let read =
            tokio::time::timeout(LONG, self.0.read_line(&mut line)).await.expect("a line or the end of the connection");
        (read.unwrap_or(0) > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    async fn ask(&mut self, line: &str) -> Value {
        self.send(line).await;
        self.receive().await.expect("an answer")
    }
}

/// Clients of a server with these limits.
fn server(limits: Limits) -> impl AsyncFn() -> Connection {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::from_std(crate::host::socket::listen(dir.path(), SOCKET).unwrap()).unwrap();
    serve(listener, 7, METHODS, limits);
    async move || Connection(BufReader::new(UnixStream::connect(dir.path().join(SOCKET)).await.unwrap()))
}

fn code(answer: &Value) -> i64 {
    answer["error"]["code"].as_i64().unwrap_or_else(|| panic!("no error: {answer}"))
}

#[tokio::test]
async fn calls_on_one_connection_are_answered_in_order_even_with_invalid_lines_between_them() {
    let connect = server(Limits { answer: SHORT, ..Limits::default() });
    let mut client = connect().await;
    client.send(r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#).await;
    client.send("no json").await;
    client.send(r#"{"jsonrpc":"2.0","method":"number"}"#).await;
    client.send(r#"{"jsonrpc":"2.0","id":"b","method":"compute.vm.number"}"#).await;
    assert_eq!(client.receive().await.unwrap(), json!({"jsonrpc": "2.0", "id": 1, "result": 7}));
    let garbled = client.receive().await.unwrap();
    assert_eq!((code(&garbled), &garbled["id"]), (rpc::PARSE_ERROR, &Value::Null));
    // The notification has no answer.
    assert_eq!(client.receive().await.unwrap(), json!({"jsonrpc": "2.0", "id": "b", "result": 7}));

    let table = [("nothing", rpc::METHOD_NOT_FOUND), ("compute.vm.compute.vm.number", rpc::METHOD_NOT_FOUND)];
    let table = [("stop", rpc::REFUSED), ("never", rpc::INTERNAL_ERROR), ("panic", rpc::INTERNAL_ERROR)]
        .into_iter()
        .chain(table)
        .chain([("echo", rpc::INVALID_PARAMS)]);
    for (method, expected) in table {
        let answer = client.ask(&json!({"jsonrpc": "2.0", "id": 2, "method": method}).to_string()).await;
        assert_eq!((code(&answer), &answer["id"]), (expected, &json!(2)), "{method}: {answer}");
    }
    let unknown = r#"{"jsonrpc":"2.0","id":3,"method":"echo","params":{"text":"a","loud":true}}"#;
    let answer = client.ask(unknown).await;
    assert_eq!(code(&answer), rpc::INVALID_PARAMS);
    assert!(answer["error"]["message"].as_str().unwrap().contains("loud"), "{answer}");
    assert_eq!(client.ask(r#"{"jsonrpc":"2.0","id":4,"method":"number"}"#).await["result"], 7);
}

#[tokio::test]
async fn a_streaming_call_exchanges_notifications_and_then_returns_its_result() {
    let connect = server(Limits::default());
    let mut client = connect().await;
    let begin = |id: u32| format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"echo","params":{{"text":"a"}}}}"#);
    let echoed = |text: &str| json!({"jsonrpc": "2.0", "method": "compute.vm.echo", "params": {"text": text}});
    assert_eq!(client.ask(&begin(1)).await, echoed("a"));
    let note = r#"{"jsonrpc":"2.0","method":"echo.input","params":{"text":"b"}}"#;
    assert_eq!(client.ask(note).await, echoed("b"));
    assert_eq!(code(&client.ask(&begin(2)).await), rpc::BUSY);
    assert_eq!(code(&client.ask("}").await), rpc::PARSE_ERROR);
    let end = r#"{"jsonrpc":"2.0","method":"compute.vm.echo.end"}"#;
    assert_eq!(client.ask(end).await, json!({"jsonrpc": "2.0", "id": 1, "result": 1}));
    assert_eq!(client.ask(r#"{"jsonrpc":"2.0","id":3,"method":"number"}"#).await["result"], 7);

    // A client that closes its side and keeps reading still gets its response.
    assert_eq!(client.ask(&begin(4)).await, echoed("a"));
    client.0.get_mut().shutdown().await.unwrap();
    assert_eq!(client.receive().await.unwrap(), json!({"jsonrpc": "2.0", "id": 4, "result": 0}));
    assert_eq!(client.receive().await, None);
}

#[tokio::test]
async fn clients_with_an_endless_line_or_without_calls_are_disconnected() {
    let connect = server(Limits { line: 100, idle: SHORT, ..Limits::default() });
    let mut client = connect().await;
    let longest = format!("{:<100}", r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#);
    assert_eq!(client.ask(&longest).await["result"], 7);
    let answer = client.ask(&format!("{longest} ")).await;
    assert_eq!(code(&answer), rpc::INVALID_REQUEST);
    assert_eq!(answer["error"]["message"], "a line is longer than 100 bytes");
    assert_eq!(client.receive().await, None);
    assert_eq!(connect().await.receive().await, None, "the client was idle for too long");
}

#[tokio::test]
async fn clients_beyond_the_limit_are_turned_away_until_another_disconnects() {
    let connect = server(Limits { clients: 1, ..Limits::default() });
    let mut first = connect().await;
    assert_eq!(first.ask(r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#).await["result"], 7);
    let mut second = connect().await;
    let answer = second.receive().await.unwrap();
    assert_eq!(code(&answer), rpc::BUSY);
    assert_eq!(second.receive().await, None);
    drop(first);
    let started = Instant::now();
    loop {
        let mut third = connect().await;
        third.send(r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#).await;
        if third.receive().await.unwrap()["result"] == 7 {
            return;
        }
        assert!(started.elapsed() < LONG, "the place of a disconnected client stays taken");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_disconnected_and_holds_nobody_up() {
    let connect = server(Limits { stall: SHORT, clients: 2, ..Limits::default() });
    let mut slow = connect().await;
    slow.send(r#"{"jsonrpc":"2.0","id":1,"method":"flood"}"#).await;
    let mut other = connect().await;
    assert_eq!(other.ask(r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#).await["result"], 7);
    tokio::time::sleep(3 * SHORT).await;
    assert_eq!(other.ask(r#"{"jsonrpc":"2.0","id":2,"method":"number"}"#).await["result"], 7);
    // The client still reads what had reached it. The connection then ends, perhaps in the middle of a line.
    let mut rest = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut slow.0, &mut rest);
    tokio::time::timeout(LONG, read).await.expect("the connection ends").unwrap();
    assert!(rest.len() > 10_000);
    let mut third = connect().await;
    assert_eq!(third.ask(r#"{"jsonrpc":"2.0","id":1,"method":"number"}"#).await["result"], 7);
}

#[tokio::test]
async fn discovery_describes_every_method() {
    let mut client = server(Limits::default())().await;
    let answer = client.ask(r#"{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}"#).await;
    let methods = answer["result"]["methods"].as_array().unwrap();
    let names: Vec<_> = methods.iter().map(|method| method["name"].as_str().unwrap()).collect();
    let mut expected: Vec<_> = METHODS.iter().map(|method| method.name).collect();
    expected.push("rpc.discover");
    assert_eq!(names, expected);
    let of = |name: &str| methods.iter().find(|method| method["name"] == name).unwrap();
    assert_eq!(of("compute.vm.echo")["params"][0]["required"], true);
    assert_eq!(of("compute.vm.echo")["x-streaming"], true);
    assert_eq!(of("compute.vm.stop")["errors"][0]["message"], "another program does that");
}
