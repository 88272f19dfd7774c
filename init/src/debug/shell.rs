//! A root shell without login on a console of its own, respawned when it exits.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_protos::chain::Chain;
use tokio::time::{Instant, sleep};

use super::environment::environment;
use crate::cgroup;
use crate::error::CallError;
use crate::launch::{ControllingTerminal, Program, launch};
use crate::reaper::{Exit, Reaper};
use crate::spawn::ChildStreams;

/// Exists only in the debug initramfs.
const SHELL: &str = "/bin/sh";
/// The shell's console, a virtio console. Not the serial one: containers may open that as /dev/console, and would read
/// what an operator types.
const DEVICE: &str = "/dev/hvc0";

/// A shell that ran for this long was used: its successor starts at once.
const USED: Duration = Duration::from_secs(1);
/// Shortest and longest pause before the successor of a shell that was not used.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(16));

/// Runs shells on the console as long as the guest lives.
pub(super) async fn respawn(reaper: Arc<Reaper>) {
    if !Path::new(SHELL).exists() {
        tracing::warn!("no shell on the console: only the debug initramfs contains {SHELL}");
        return;
    }
    let mut last = Duration::ZERO;
    loop {
        let began = Instant::now();
        match run(&reaper).await {
            Ok(status) => tracing::debug!(status, "the console's shell exited"),
            Err(error) => tracing::warn!(error = %Chain(&error), "failed to start a shell on the console"),
        }
        last = pause(began.elapsed(), last);
        sleep(last).await;
    }
}

/// The pause after a shell that ran for `lived` and started after the pause `last`.
fn pause(lived: Duration, last: Duration) -> Duration {
    let (shortest, longest) = BACKOFF;
    if lived >= USED { Duration::ZERO } else { (last * 2).clamp(shortest, longest) }
}

/// Runs a shell and returns its exit status. Processes that it leaves behind keep running.
async fn run(reaper: &Arc<Reaper>) -> Result<u32, CallError> {
    let group = Path::new(cgroup::DEBUG).join("shell");
    match std::fs::create_dir(&group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(CallError::internal("create the shell's cgroup", &error));
        }
        _ => {}
    }
    let program = Program {
        args: &[SHELL.to_owned()],
        env: &environment(&[]),
        cwd: "/",
        group: &group,
        oom_score_adj: "0",
        terminal: ControllingTerminal::Device(DEVICE),
    };
    let (_, exit) = launch(reaper, &program, ChildStreams::default()).await?;
    // Cannot fail: the reaper lives as long as the guest and delivers every exit.
    Ok(exit.await.map_or(0, |Exit { status, .. }| status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_used_shell_is_respawned_at_once_and_others_with_backoff() {
        let ms = Duration::from_millis;
        let cases = [
            (ms(0), ms(0), ms(250)),
            (ms(999), ms(250), ms(500)),
            (ms(10), ms(8000), ms(16_000)),
            (ms(10), ms(16_000), ms(16_000)),
            (ms(1000), ms(16_000), ms(0)),
            (ms(10), ms(0), ms(250)),
        ];
        for (lived, last, expected) in cases {
            assert_eq!(pause(lived, last), expected, "{lived:?} {last:?}");
        }
    }
}
