//! The wait of a boot: for the guest's hello, for the end of one of the VM's processes, or for the deadline.

use std::io;
use std::time::Duration;

use husk_protos::system::Hello;
use husk_vsock::Stream;
use tokio::time::Instant;

use super::error::BootError;
use super::plan::BootPlan;
use super::processes::{CONSOLE_DEADLINE, CONSOLE_LINES, MACHINE_DELAY, Processes, last_words};
use crate::guest::link::{HostPort, LinkError};
use crate::host::run_delay::{CpuWaits, RunDelays};

/// The longest boot of a machine that waits for CPUs, in deadlines.
const STARVED: u32 = 4;
/// How often a deadline is measured.
const PARTS: u32 = 10;

impl Processes {
    /// The guest's hello, without the offers that the plan declines, and the connection on which its reports follow.
    pub(super) async fn hello(&self, ready: &mut HostPort, plan: &BootPlan) -> Result<(Stream, Hello), BootError> {
        let deadline = plan.boot_timeout;
        tokio::select! {
            hello = receive(ready) => match hello {
                Ok((stream, mut hello)) => {
                    hello.raw_streams &= plan.raw_streams;
                    Ok((stream, hello))
                }
                // The connection ends with the machine, whose own end explains more.
                Err(error) => match tokio::time::timeout(MACHINE_DELAY, self.machine.exited()).await {
                    Ok(cause) => Err(self.ended(self.with_share(cause).await).await),
                    Err(_) => Err(error),
                },
            },
            cause = self.machine.exited() => Err(self.ended(self.with_share(cause).await).await),
            exit = self.share.exited() => {
                let cause = match tokio::time::timeout(MACHINE_DELAY, self.machine.exited()).await {
                    Ok(cause) => self.with_share(cause).await,
                    Err(_) => format!("virtiofsd {exit}"),
                };
                Err(self.ended(cause).await)
            }
            cause = self.flooded() => Err(self.ended(cause).await),
            waited = expired(deadline, || RunDelays::of(self.machine.process())) => {
                Err(BootError::Deadline { deadline, waited, console: self.console.tail(CONSOLE_LINES) })
            }
        }
    }

    /// Adds virtiofsd's failure to the cause: the machine exits when virtiofsd fails. When the machine exits first,
    /// virtiofsd exits with success.
    async fn with_share(&self, cause: String) -> String {
        match tokio::time::timeout(MACHINE_DELAY, self.share.exited()).await {
            Ok(exit) if !exit.0.success() => format!("{cause}; virtiofsd {exit}"),
            _ => cause,
        }
    }

    async fn ended(&self, cause: String) -> BootError {
        let cause = self.console.explain(cause, CONSOLE_DEADLINE).await;
        let last = format!("{}\n{}", self.console.tail(CONSOLE_LINES), last_words(&self.logs).await);
        BootError::Ended { cause, console: last.trim().to_owned() }
    }
}

/// Returns when a boot has had the time of its deadline, in which the machine's waits for a CPU of the host do not count,
/// or [`STARVED`] deadlines have passed. Returns for how long the machine has waited. When many VMs boot at once, the
/// last would otherwise be killed shortly before they are ready, and those in their place as well.
async fn expired(deadline: Duration, delays: impl Fn() -> io::Result<RunDelays>) -> Duration {
    let (began, mut counted, mut waits) = (Instant::now(), Duration::ZERO, CpuWaits::begin(delays()));
    loop {
        tokio::time::sleep((deadline / PARTS).min(deadline - counted)).await;
        let (waited, passed) = waits.sample(delays());
        counted += passed - waited;
        if counted >= deadline || began.elapsed() >= deadline * STARVED {
            return began.elapsed().saturating_sub(counted);
        }
    }
}

async fn receive(ready: &mut HostPort) -> Result<(Stream, Hello), BootError> {
    let mut stream = ready.accept().await.map_err(LinkError::from)?;
    let hello = husk_protos::frame::read(&mut stream).await?;
    Ok((stream, hello))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_cpu_does_not_count_for_a_boot_but_not_without_end() {
        let deadline = Duration::from_secs(60);
        // The share of its time for which the machine waits, in percent, and when the boot fails.
        for (share, expected) in [(0, 60), (50, 120), (100, 240)] {
            let (began, waited) = (Instant::now(), Cell::new(Duration::ZERO));
            let delays = || {
                waited.set(began.elapsed() * share / 100);
                Ok(RunDelays::of_waiting(waited.get()))
            };
            let reported = expired(deadline, delays).await;
            let took = began.elapsed();
            // Timers have a resolution of a millisecond.
            assert!(took.abs_diff(Duration::from_secs(expected)) < Duration::from_millis(100), "{share}: {took:?}");
            assert!(reported.abs_diff(waited.get()) < Duration::from_millis(100), "{share}: {reported:?}");
        }
        // Without the numbers, every second counts.
        let began = Instant::now();
        expired(deadline, || Err(io::ErrorKind::NotFound.into())).await;
        assert!(began.elapsed().abs_diff(deadline) < Duration::from_millis(100), "{:?}", began.elapsed());
    }
}
