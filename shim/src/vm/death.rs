//! When and why a VM is dead. The VM dies with each of its parts: the machine, virtiofsd, and the connection on which
//! the guest reports.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::console::Attached;
use crate::host::child::Child;
use crate::vmm::Machine;

/// The machine's exit may be noticed this much later than that of its sockets.
pub(super) const MACHINE_DELAY: Duration = Duration::from_millis(200);
/// The guest's connection ends when the machine begins to exit, and the exit then takes longer: a loaded host needs
/// time to free the memory.
const MACHINE_EXIT_DELAY: Duration = Duration::from_millis(600);
/// Lines of the console that explain an end.
pub(super) const CONSOLE_LINES: usize = 24;
/// How long the console's last output may take to arrive after the machine's exit.
pub(super) const CONSOLE_DEADLINE: Duration = Duration::from_millis(500);

/// Waits for the first part of the VM to fail, kills the machine, and publishes the cause. `lost` resolves when the
/// guest's reports end, with the reason; `failed` holds a cause once the VM has to be killed.
pub(super) async fn watch_death(
    machine: Arc<dyn Machine>,
    share: Arc<Child>,
    console: Attached,
    lost: impl Future<Output = String>,
    mut failed: watch::Receiver<Option<String>>,
    death: watch::Sender<Option<String>>,
) {
    let cause = tokio::select! {
        cause = machine.exited() => cause,
        exit = share.exited() => machine_exit_or(&*machine, MACHINE_DELAY, format!("virtiofsd {exit}")).await,
        cause = lost => machine_exit_or(&*machine, MACHINE_EXIT_DELAY, cause).await,
        cause = failure(&mut failed) => machine_exit_or(&*machine, MACHINE_DELAY, cause).await,
    };
    let exited = tokio::time::timeout(Duration::ZERO, machine.exited()).await.is_ok();
    // virtiofsd exits when the machine closes its socket.
    machine.kill();
    // The guest may explain an exit on its console, but not a kill.
    let cause = if exited { console.explain(cause, CONSOLE_DEADLINE).await } else { cause };
    death.send_replace(Some(cause));
}

/// How the machine exited, if it exits within `delay`, else `cause`: another part's end may be noticed a moment before
/// the machine's exit that explains it.
async fn machine_exit_or(machine: &dyn Machine, delay: Duration, cause: String) -> String {
    tokio::time::timeout(delay, machine.exited()).await.unwrap_or(cause)
}

async fn failure(failed: &mut watch::Receiver<Option<String>>) -> String {
    // An error means that the VM's handle was dropped, which kills the machine.
    let cause = failed.wait_for(Option::is_some).await.map_or(None, |cause| cause.clone());
    match cause {
        Some(cause) => cause,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;
    use crate::host::child::Launch;
    use crate::host::process::ProcessId;

    /// A process in place of the machine's or virtiofsd's.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let launch = Launch {
                program: "/bin/sleep".into(),
                args: vec!["60".into()],
                env: Vec::new(),
                fds: Vec::new(),
                user: None,
                output: tempfile::tempfile().unwrap(),
                cgroups: Vec::new(),
                leads: true,
            };
            Self(launch.spawn().unwrap())
        }
    }

    #[async_trait::async_trait]
    impl Machine for Sleeper {
        fn process(&self) -> ProcessId {
            self.0.process()
        }

        async fn exited(&self) -> String {
            format!("the machine {}", self.0.exited().await)
        }

        async fn plug(&self, _: crate::vmm::NicEnd) -> Result<(), crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::NoSlot)
        }

        async fn vcpu_threads(&self) -> Result<Vec<i32>, crate::vmm::VmmError> {
            Ok(Vec::new())
        }

        fn kill(&self) {
            self.0.kill();
        }
    }

    #[tokio::test]
    async fn a_vm_dies_with_each_of_its_parts_and_reports_why_it_was_failed() {
        let cases = ["machine", "share", "connection", "failed"];
        for case in cases {
            let (machine, share) = (Arc::new(Sleeper::start()), Arc::new(Sleeper::start().0));
            let (lose, loss) = tokio::sync::oneshot::channel::<()>();
            let lost = async {
                let _ = loss.await;
                "the guest's connection was lost".to_owned()
            };
            let ((failure, failed), (death, dead)) = (watch::channel(None), watch::channel(None));
            let folder = tempfile::tempdir().unwrap();
            let console = crate::console::Console::new(folder.path()).attach(UnixStream::pair().unwrap().0);
            let watching = tokio::spawn(watch_death(machine.clone(), share.clone(), console, lost, failed, death));
            let expected = match case {
                "machine" => {
                    machine.kill();
                    "the machine was killed by signal 9"
                }
                "share" => {
                    share.kill();
                    "virtiofsd was killed by signal 9"
                }
                "connection" => {
                    lose.send(()).unwrap();
                    "the guest's connection was lost"
                }
                _ => {
                    failure.send_replace(Some("its events are lost".to_owned()));
                    "its events are lost"
                }
            };
            watching.await.unwrap();
            assert_eq!(dead.borrow().as_deref(), Some(expected), "{case}");
            assert_eq!(machine.exited().await, "the machine was killed by signal 9");
            share.kill();
        }
    }
}
