//! Connections between the host's programs and a VM: those of `kubectl port-forward`, which start inside the pod's
//! network namespace on the host, and Unix sockets of the host that containers mount.
#![cfg(not(target_env = "musl"))]

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::artifacts::Runtime;
use husk_tests::command::wait_for;
use husk_tests::containerd::{Configured, Container, Containerd};
use husk_tests::leftovers::Leftovers;
use husk_tests::netns;
use husk_tests::vm::guest_program;

/// Deadline for one step of a connection.
const STEP: Duration = Duration::from_secs(60);

/// A network namespace of the daemon, as CNI plugins leave one for a pod.
struct Pod<'a> {
    containerd: &'a Containerd,
    name: String,
}

impl<'a> Pod<'a> {
    fn new(containerd: &'a Containerd, name: &str) -> Result<Self> {
        let pod = Self { containerd, name: format!("pod-{}", containerd.id(name)) };
        pod.sh("ip netns add $pod
            ip -n $pod link set lo up
            ip -n $pod link add eth0 type veth peer name peer0
            ip -n $pod addr add 10.88.0.7/16 dev eth0
            ip -n $pod addr add fd00:88::7/64 dev eth0 nodad
            for link in eth0 peer0; do ip -n $pod link set $link up; done")?;
        Ok(pod)
    }

    fn sh(&self, script: &str) -> Result<String> {
        Ok(self.containerd.sh(&format!("set -e; pod={}\n{script}", self.name))?.text())
    }

    /// A container in the pod that runs `/peer` with these arguments.
    fn peer(&self, runtime: Runtime, name: &str, arguments: &[&str]) -> Result<Container<'a>> {
        let namespace = format!("network:/run/netns/{}", self.name);
        let flags = ["--with-ns", &namespace, "--mount", &peer_mount()?];
        self.containerd.detached_with(runtime, &flags, name, &[&["/peer"], arguments].concat())
    }

    /// Connects from inside the namespace, as containerd's CRI plugin does for a port-forward.
    fn connect(&self, address: &str) -> Result<TcpStream> {
        let address: SocketAddr = address.parse()?;
        let path = self.containerd.path(Path::new("/run/netns").join(&self.name));
        netns::within(&path, || {
            let stream = TcpStream::connect_timeout(&address, STEP)?;
            stream.set_read_timeout(Some(STEP))?;
            stream.set_write_timeout(Some(STEP))?;
            Ok(stream)
        })
    }

    /// Sends bytes, ends this direction, and reads until the server ends its own.
    fn ask(&self, address: &str, question: &[u8]) -> Result<Vec<u8>> {
        exchange(self.connect(address)?, question).with_context(|| address.to_owned())
    }

    /// Waits until the container's server listens.
    fn await_server(&self, address: &str) -> Result<()> {
        wait_for(STEP, "the server answers", || self.ask(address, b"x").ok().filter(|answer| !answer.is_empty()))
            .map(drop)
    }

    /// The tables of nf_tables in the namespace.
    fn tables(&self) -> Result<String> {
        self.sh("ip netns exec $pod nft list tables")
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let _ = self.sh("ip netns delete $pod");
    }
}

fn peer_mount() -> Result<String> {
    Ok(format!("type=bind,src={},dst=/peer,options=rbind:ro", guest_program("peer")?.display()))
}

fn exchange(mut stream: TcpStream, question: &[u8]) -> Result<Vec<u8>> {
    let mut sender = stream.try_clone()?;
    thread::scope(|scope| {
        let sent = scope.spawn(move || {
            sender.write_all(question)?;
            sender.shutdown(Shutdown::Write)
        });
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        sent.join().map_err(|_| anyhow!("the sender panicked"))??;
        Ok(answer)
    })
}

fn bytes(length: usize) -> Vec<u8> {
    husk_tests::pattern::Pattern::new(7, length).at(0, length).to_vec()
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_port_forward_reaches_servers_on_the_pods_loopback() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "reach")?;
    let addresses = ["127.0.0.1:8080", "[::1]:8080", "10.88.0.7:9000", "[fd00:88::7]:9000"];
    // runc shows that the client and the server are right.
    for runtime in [Runtime::Runc, Runtime::Husk] {
        let name = format!("reach-{}", runtime.name().rsplit('.').nth(1).unwrap_or_default());
        let container = pod.peer(runtime, &name, &[&["echo"], &addresses[..]].concat())?;
        pod.await_server(addresses[0])?;
        // The client ends its direction before it has received everything.
        let sent = bytes(3_000_000);
        for address in addresses {
            ensure!(pod.ask(address, &sent)? == sent, "{}: {address}", runtime.name());
        }
        container.kill_and_wait()?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_server_that_ends_first_still_receives_everything() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "greet")?;
    let container = pod.peer(Runtime::Husk, "greet", &["greet", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")?;
    let mut client = pod.connect("127.0.0.1:8080")?;
    let mut greeting = String::new();
    client.read_to_string(&mut greeting)?;
    ensure!(greeting == "hello", "{greeting}");
    // The server's direction has ended; the client's has not.
    let sent = bytes(1_000_000);
    client.write_all(&sent)?;
    client.shutdown(Shutdown::Write)?;
    // The server closes when it has received everything: then the relay has nothing left.
    let mut log = String::new();
    wait_for(STEP, "the server has received everything", || {
        log = container.exec(&["sh", "-c", "cat /proc/1/net/tcp"]).ok().ok()?.text();
        // 0100007F:1F90 in state 01 (established), 04 to 06, 08 or 09 (closing) would be a remaining connection.
        let open = log.lines().filter(|line| line.contains("0100007F:1F90 ") && !line.contains(" 0A "));
        (open.filter(|line| !line.contains(" 06 ")).count() == 0).then_some(())
    })
    .context(log)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_closed_port_is_refused_and_a_dead_server_resets() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "closed")?;
    let container = pod.peer(Runtime::Husk, "closed", &["echo", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")?;
    for address in ["127.0.0.1:81", "[::1]:81", "[::1]:8080"] {
        let error = pod.connect(address).and_then(|mut stream| Ok(stream.read(&mut [0])?)).err();
        let kind = error.as_ref().and_then(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind);
        ensure!(
            matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused)),
            "{address}: {error:?}"
        );
    }
    // A client must be able to tell a server that was killed from one that has sent everything.
    let mut client = pod.connect("127.0.0.1:8080")?;
    client.write_all(b"x")?;
    client.read_exact(&mut [0])?;
    containerd_kill_vm(&pod, &container)?;
    let error = client.read(&mut [0]).err().map(|error| error.kind());
    ensure!(error == Some(ErrorKind::ConnectionReset), "{error:?}");
    Ok(())
}

fn containerd_kill_vm(pod: &Pod, container: &Container) -> Result<()> {
    pod.containerd.qemu_of(container.id())?.kill();
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_thousand_connections_leave_nothing_behind() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "many")?;
    let container = pod.peer(Runtime::Husk, "many", &["echo", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")?;
    let shim = pod.containerd.shim_of(container.id())?.0.pid;
    let resources = || -> Result<[usize; 2]> {
        let count = |name: &str| Ok::<_, io::Error>(fs::read_dir(format!("/proc/{shim}/{name}"))?.count());
        Ok([count("fd")?, count("task")?])
    };
    let in_guest = || container.script("ls /proc/1/fd | wc -l; cat /proc/net/sockstat | grep '^TCP: inuse'");
    wait_for(STEP, "the first connection is gone", || in_guest().ok().filter(|now| now.contains("inuse 1 ")))?;
    let before = resources()?;
    thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..50)
            .map(|client| {
                let pod = &pod;
                scope.spawn(move || -> Result<()> {
                    for n in 0..20 {
                        let sent = bytes(1000 + 977 * ((client + n) % 50));
                        ensure!(pod.ask("127.0.0.1:8080", &sent)? == sent, "client {client}, connection {n}");
                    }
                    Ok(())
                })
            })
            .collect();
        clients.into_iter().try_for_each(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
    })?;
    let mut now = before;
    let settled = wait_for(STEP, "the shim has no more descriptors and threads than before", || {
        now = resources().ok()?;
        // The runtime keeps idle threads for some seconds.
        (now[0] <= before[0] && now[1] <= before[1]).then_some(())
    });
    settled.with_context(|| format!("{before:?} descriptors and threads before, {now:?} after"))?;
    wait_for(STEP, "the guest has no connections left", || in_guest().ok().filter(|now| now.contains("inuse 1 ")))?;
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn more_clients_than_may_be_served_at_a_time_wait_for_their_turn() -> Result<()> {
    let pod = Pod::new(Containerd::shared()?, "wait")?;
    let _container = pod.peer(Runtime::Husk, "wait", &["echo", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")?;
    let mut clients = (0..140).map(|_| pod.connect("127.0.0.1:8080")).collect::<Result<Vec<_>>>()?;
    for client in &mut clients {
        client.write_all(b"x")?;
    }
    for (n, mut client) in clients.into_iter().enumerate() {
        client.read_exact(&mut [0]).with_context(|| format!("client {n}"))?;
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn the_redirection_ends_with_the_vm() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "ends")?;
    let container = pod.peer(Runtime::Husk, "deleted", &["echo", "127.0.0.1:8080"])?;
    ensure!(pod.tables()?.contains(&format!("table inet husk-{}", container.id())), "{}", pod.tables()?);
    container.kill_and_wait()?;
    container.delete_task()?;
    let clean = || wait_for(STEP, "no table is left", || pod.tables().ok().filter(String::is_empty).map(drop));
    clean()?;
    let container = pod.peer(Runtime::Husk, "killed", &["echo", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")?;
    containerd.shim_of(container.id())?.0.kill();
    clean()?;
    // Nothing of it is in the way of the next runtime.
    let _runc = pod.peer(Runtime::Runc, "runc", &["echo", "127.0.0.1:8080"])?;
    pod.await_server("127.0.0.1:8080")
}

/// An interactive `nft` in the namespace. Its tables with an owner belong to it.
fn nft(pod: &Pod, command: &str) -> Result<Child> {
    let mut nft = pod.containerd.enter("ip");
    nft.args(["netns", "exec", &pod.name, "nft", "--interactive"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut nft = nft.spawn()?;
    nft.stdin.as_mut().context("no stdin")?.write_all(command.as_bytes())?;
    wait_for(STEP, "nft has made the table", || pod.tables().ok().filter(|tables| tables.contains("husk-")))?;
    Ok(nft)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_pod_whose_connections_cannot_be_redirected_works_and_the_log_says_so() -> Result<()> {
    let containerd = Containerd::shared()?;
    let pod = Pod::new(containerd, "without")?;
    let id = containerd.id("without");
    let mut owner = nft(&pod, &format!("add table inet husk-{id} {{ flags owner; }}\n"))?;
    let container = containerd.adopt(&id);
    let namespace = format!("network:/run/netns/{}", pod.name);
    let mut run = containerd.ctr(["run", "--detach", "--runtime", Runtime::Husk.name(), "--with-ns", &namespace]);
    run = run.args([containerd.image(), &id, "sleep", "1000"]);
    run.ok()?;
    ensure!(container.script("echo works")? == "works");
    let logged = containerd.await_logged(&format!("nf_tables table husk-{id}: add it: Operation not permitted"), 1)?;
    ensure!(logged.len() == 1 && logged[0].contains("level=warning"), "{logged:#?}\n{}", containerd.log_tail());
    container.kill_and_wait()?;
    container.delete_task()?;
    drop(owner.stdin.take());
    owner.wait()?;
    Ok(())
}

/// A server of the host that returns what each client sends until the client ends its direction.
struct EchoServer {
    path: PathBuf,
}

impl EchoServer {
    fn start(path: PathBuf, mode: u32, gid: u32) -> Result<Self> {
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        chown(&path, None, Some(gid))?;
        let gone = path.with_extension("gone");
        thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                if gone.exists() {
                    return;
                }
                thread::spawn(move || -> io::Result<()> {
                    let mut back = client.try_clone()?;
                    io::copy(&mut client, &mut back)?;
                    back.shutdown(Shutdown::Write)
                });
            }
        });
        Ok(Self { path })
    }

    /// Stops listening and removes the socket.
    fn stop(self) -> Result<()> {
        let gone = self.path.with_extension("gone");
        fs::write(&gone, "")?;
        drop(std::os::unix::net::UnixStream::connect(&self.path)?);
        fs::remove_file(&self.path)?;
        wait_for(STEP, "the listener is closed", || {
            let sockets = fs::read_to_string("/proc/net/unix").ok()?;
            (!sockets.contains(&*self.path.to_string_lossy())).then_some(())
        })?;
        Ok(fs::remove_file(gone)?)
    }
}

fn configured() -> Result<Configured> {
    Configured::start("sockets = [\"/run/echo.sock\", \"/run/plugins/\"]")
}

fn mount(source: &str, options: &str) -> String {
    format!("type=bind,src={source},dst=/var/run/service.sock,options=rbind:{options}")
}

/// Sends these bytes to this socket from a container, and returns the answer.
fn ask(containerd: &Containerd, source: &str, user: &str, options: &str, question: &[u8]) -> Result<Vec<u8>> {
    // A file, because ctr loses the end of a short stdin of a container's first process.
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), question)?;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o644))?;
    let question = format!("type=bind,src={},dst=/question,options=rbind:ro", file.path().display());
    let mounts = [mount(source, options), peer_mount()?, question];
    let mut flags = vec!["--user", user];
    mounts.iter().for_each(|mount| flags.extend(["--mount", mount]));
    let script = "/peer ask /var/run/service.sock </question";
    Ok(containerd.run(&flags, &containerd.id("ask"), &["sh", "-c", script]).ok()?.stdout)
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_mounted_socket_of_the_host_works_for_those_who_may_open_it() -> Result<()> {
    let daemon = configured()?;
    let containerd = &daemon.containerd;
    let _echo = EchoServer::start(containerd.path("/run/echo.sock"), 0o660, 1000)?;
    fs::create_dir(containerd.path("/run/plugins"))?;
    let _plugin = EchoServer::start(containerd.path("/run/plugins/csi.sock"), 0o600, 0)?;
    containerd.sh("ln -s /run/echo.sock /run/link.sock; ln -s /run /run/other")?;
    // The client ends its direction first; everything comes back.
    let sent = bytes(3_000_000);
    ensure!(ask(containerd, "/run/echo.sock", "0:0", "rw", &sent)? == sent);
    let allowed = [
        ("/run/echo.sock", "1000:1000", "ro"),
        ("/run/plugins/csi.sock", "0:0", "rw"),
        ("/run/link.sock", "0:0", "rw"),
        ("/run/other/echo.sock", "0:0", "ro"),
    ];
    for (source, user, options) in allowed {
        ensure!(ask(containerd, source, user, options, b"hello")? == b"hello", "{source} as {user}");
    }
    for (source, user) in [("/run/echo.sock", "1000:1001"), ("/run/plugins/csi.sock", "1000:1000")] {
        let error = ask(containerd, source, user, "rw", b"hello").err().map(|error| format!("{error:?}"));
        ensure!(error.as_ref().is_some_and(|error| error.contains("Permission denied")), "{source} {user}: {error:?}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn sockets_that_the_configuration_does_not_allow_are_rejected_by_name() -> Result<()> {
    let daemon = configured()?;
    let containerd = &daemon.containerd;
    containerd.sh("mkdir /run/plugins /run/plugins-other; ln -s /run/secret.sock /run/plugins/link")?;
    let _secret = EchoServer::start(containerd.path("/run/secret.sock"), 0o666, 0)?;
    let _other = EchoServer::start(containerd.path("/run/plugins-other/csi.sock"), 0o666, 0)?;
    let _datagrams = UnixDatagram::bind(containerd.path("/run/plugins/datagrams"))?;
    let rejected = [
        ("/run/secret.sock", "is the socket /run/secret.sock of the host, which the configuration does not allow"),
        ("/run/plugins-other/csi.sock", "add it to the key sockets"),
        ("/run/plugins/link", "is the socket /run/secret.sock of the host"),
        ("/run/plugins/datagrams", "is a socket for datagrams, but only stream sockets work in a VM"),
    ];
    for (source, expected) in rejected {
        let ran = containerd.run(&["--mount", &mount(source, "rw")], &containerd.id("no"), &["true"]).output()?;
        ensure!(ran.code() != 0 && ran.errors().contains(expected) && ran.errors().contains(source), "{ran}");
    }
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_guest_reaches_only_the_sockets_that_its_containers_mount() -> Result<()> {
    let daemon = configured()?;
    let containerd = &daemon.containerd;
    let _echo = EchoServer::start(containerd.path("/run/echo.sock"), 0o600, 0)?;
    let probe = format!("type=bind,src={},dst=/probe,options=rbind:ro", guest_program("probe")?.display());
    let socket = mount("/run/echo.sock", "rw");
    let flags = ["--mount", &socket, "--mount", &probe, "--annotation", "io.husk.vsock=true"];
    // The number of a socket, and the shim's reply: connected, or ENOENT. Too few bytes and a frame without its bytes
    // end the connection.
    let table = [("00000001", "00"), ("00000002", "02"), ("ffffffff", "02"), ("0000", ""), ("00000001ffff", "00")];
    let script = table.map(|(number, _)| format!("/probe ask 2 1028 {number}")).join("; ");
    let replies = containerd.script(&flags, "numbers", &script)?;
    ensure!(replies.split('\n').eq(table.map(|(_, reply)| reply)), "{replies}");
    Ok(())
}

#[test]
#[cfg_attr(runc, ignore = "about VMs")]
fn a_mounted_socket_outlives_its_server_and_ends_with_its_container() -> Result<()> {
    let daemon = configured()?;
    let containerd = &daemon.containerd;
    containerd.run(&[], &containerd.id("first"), &["true"]).ok()?;
    let before = Leftovers::now(containerd);
    let echo = EchoServer::start(containerd.path("/run/echo.sock"), 0o600, 0)?;
    let flags = ["--mount", &mount("/run/echo.sock", "rw"), "--mount", &peer_mount()?];
    let container = containerd.detached(&flags, "restart", &["sleep", "1000"])?;
    let ask = || container.exec(&["/peer", "ask", "/var/run/service.sock"]).stdin("hello").output();
    ensure!(ask()?.stdout == b"hello");
    echo.stop()?;
    let without = ask()?;
    ensure!(without.stdout.is_empty(), "{without}");
    let echo = EchoServer::start(containerd.path("/run/echo.sock"), 0o600, 0)?;
    ensure!(ask()?.stdout == b"hello");
    // Many at a time.
    let script = "for n in $(seq 40); do (echo $n | /peer ask /var/run/service.sock >/tmp/$n) & done; wait; cat /tmp/*";
    let mut answers: Vec<u32> = container.script(script)?.lines().map(str::parse).collect::<Result<_, _>>()?;
    answers.sort_unstable();
    ensure!(answers == (1..=40).collect::<Vec<_>>(), "{answers:?}");

    container.kill_and_wait()?;
    container.delete_task()?;
    containerd.ctr(["container", "rm", container.id()]).ok()?;
    echo.stop()?;
    before.expect_none_since(containerd)
}
