//! A server and a client inside containers, for the tests of forwarded connections.
//!
//! `peer echo ADDRESS…` accepts TCP connections at these addresses, and returns what each client sends until it ends
//! its direction.
//! `peer greet ADDRESS` greets each client, ends its own direction, and then prints the number of bytes that the client
//! sends.
//! `peer ask PATH` sends its stdin to a Unix socket, ends its direction, and prints what it receives.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let request: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    let done = match request.as_slice() {
        ["echo", addresses @ ..] => serve(addresses, echo),
        ["greet", address] => serve(&[address], greet),
        ["ask", path] => ask(path),
        _ => Err(io::Error::other("usage: peer echo ADDRESS… | greet ADDRESS | ask PATH")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "peer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(addresses: &[&str], attend: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listeners = addresses.iter().map(TcpListener::bind).collect::<io::Result<Vec<_>>>()?;
    let serve = |listener: TcpListener| {
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client that resets its connection is not a failure of the server.
                thread::spawn(move || drop(attend(client)));
            }
        })
    };
    let threads: Vec<_> = listeners.into_iter().map(serve).collect();
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a listener panicked"))?;
    }
    Ok(())
}

fn echo(mut client: TcpStream) -> io::Result<()> {
    let mut back = client.try_clone()?;
    io::copy(&mut client, &mut back)?;
    back.shutdown(Shutdown::Write)
}

fn greet(mut client: TcpStream) -> io::Result<()> {
    client.write_all(b"hello")?;
    client.shutdown(Shutdown::Write)?;
    let received = io::copy(&mut client, &mut io::sink())?;
    writeln!(io::stdout(), "received {received}")
}

fn ask(path: &str) -> io::Result<()> {
    let mut server = UnixStream::connect(path)?;
    let mut question = server.try_clone()?;
    let asked = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut question)?;
        question.shutdown(Shutdown::Write)
    });
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    asked.join().map_err(|_| io::Error::other("the sender panicked"))??;
    io::stdout().write_all(&answer)
}
