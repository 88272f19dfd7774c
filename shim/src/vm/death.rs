//! When and why a VM is dead. The VM dies with each of its parts: the machine, virtiofsd, and the connection on which
//! the guest reports.

use std::time::Duration;

use tokio::sync::watch;

use super::processes::{CONSOLE_DEADLINE, MACHINE_DELAY, Processes};
use crate::host::process::ProcessId;
use crate::vmm::Machine;

/// The guest's connection ends when the machine begins to exit, and the exit then takes longer: a loaded host needs
/// time to free the memory.
const MACHINE_EXIT_DELAY: Duration = Duration::from_millis(600);

/// Waits for the first part of the VM to fail, kills all its processes, and publishes the cause. `lost` resolves when
/// the guest's reports end, with the reason; `failed` holds a cause once the VM has to be killed.
pub(super) async fn watch_death(
    processes: Processes,
    share_workers: Vec<ProcessId>,
    lost: impl Future<Output = String>,
    mut failed: watch::Receiver<Option<String>>,
    death: watch::Sender<Option<String>>,
) {
    let Processes { machine, share, console, .. } = &processes;
    let cause = tokio::select! {
        cause = machine.exited() => cause,
        cause = processes.flooded() => cause,
        exit = share.exited() => machine_exit_or(&**machine, MACHINE_DELAY, format!("virtiofsd {exit}")).await,
        cause = lost => machine_exit_or(&**machine, MACHINE_EXIT_DELAY, cause).await,
        cause = failure(&mut failed) => machine_exit_or(&**machine, MACHINE_DELAY, cause).await,
    };
    let exited = tokio::time::timeout(Duration::ZERO, machine.exited()).await.is_ok();
    processes.kill(&share_workers);
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
    use std::fs::File;
    use std::sync::Arc;

    use tokio::net::UnixStream;

    use super::*;
    use crate::console::{Console, HelperLog};
    use crate::host::child::{Child, Launch};

    /// A process in place of the machine's or virtiofsd's.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(script: &str, output: File) -> Self {
            let launch = Launch {
                program: "/bin/sh".into(),
                args: vec!["-c".into(), script.into()],
                env: Vec::new(),
                fds: Vec::new(),
                jail: None,
                output,
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

        async fn confine(&self) -> Result<(), crate::vmm::VmmError> {
            Ok(())
        }

        async fn plug(&self, _: crate::vmm::NicEnd) -> Result<(), crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::NoSlot)
        }

        async fn offer_memory(&self, _: u64) -> Result<(), crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::FixedMemory { machine: "sh" })
        }

        async fn memory_mib(&self) -> Result<u64, crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::FixedMemory { machine: "sh" })
        }

        async fn set_memory_target(&self, _: u64) -> Result<(), crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::NoBalloon)
        }

        async fn balloon_mib(&self) -> Result<Option<u64>, crate::vmm::VmmError> {
            Ok(None)
        }

        async fn plug_disk(&self, _: crate::vmm::PluggedDisk) -> Result<u32, crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::NoSlot)
        }

        async fn unplug_disk(&self, _: u32) -> Result<(), crate::vmm::VmmError> {
            Err(crate::vmm::VmmError::NoSlot)
        }

        async fn vcpu_threads(&self) -> Result<Vec<i32>, crate::vmm::VmmError> {
            Ok(Vec::new())
        }

        fn kill(&self) {
            self.0.kill();
        }
    }

    /// virtiofsd waits for a worker of its own, which does not notice the machine's end.
    const SHARE: &str = "sleep 60 & wait";

    #[tokio::test]
    async fn a_vm_dies_with_each_of_its_parts_and_reports_why_it_was_failed() {
        let cases = ["machine", "share", "connection", "failed", "flood"];
        for case in cases {
            let folder = tempfile::tempdir().unwrap();
            let log = |name: &str| HelperLog::start(name, &folder.path().join(name)).unwrap();
            let ((machine_log, machine_output), (share_log, share_output)) = (log("QEMU"), log("virtiofsd"));
            let machine = Arc::new(Sleeper::start("exec sleep 60", machine_output));
            let loops = format!("{SHARE}; while :; do echo an error; done");
            let script = if case == "flood" { loops.replace("sleep 60 & wait; ", "") } else { SHARE.to_owned() };
            let share = Arc::new(Sleeper::start(&script, share_output).0);
            let (lose, loss) = tokio::sync::oneshot::channel::<()>();
            let lost = async {
                let _ = loss.await;
                "the guest's connection was lost".to_owned()
            };
            let ((failure, failed), (death, dead)) = (watch::channel(None), watch::channel(None));
            let console = Console::new(folder.path()).attach(UnixStream::pair().unwrap().0, None);
            let logs = [machine_log, share_log];
            let processes = Processes { machine: machine.clone(), share: share.clone(), console, logs };
            let watching = tokio::spawn(watch_death(processes, Vec::new(), lost, failed, death));
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
                "flood" => "virtiofsd prints errors without end: ",
                _ => {
                    failure.send_replace(Some("its events are lost".to_owned()));
                    "its events are lost"
                }
            };
            watching.await.unwrap();
            let cause = dead.borrow().clone().unwrap_or_default();
            assert!(cause == expected || case == "flood" && cause.starts_with(expected), "{case}: {cause}");
            assert_eq!(machine.exited().await, "the machine was killed by signal 9");
            assert_eq!(share.exited().await.to_string(), "was killed by signal 9");
        }
    }
}
