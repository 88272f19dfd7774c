//! The shell on the serial console: nobody has to log in, and when it ends, there is another.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::environment;
use crate::cgroup;
use crate::error::Error;
use crate::launch::{Program, Terminal, launch};
use crate::reaper::{Exit, Reaper};
use crate::spawn::Streams;

/// What the debug initramfs has, and the other one has not.
const SHELL: &str = "/bin/sh";
/// The console's devices; /dev/console is the last (Documentation/ABI/testing/sysfs-tty).
const ACTIVE: &str = "/sys/class/tty/console/active";

/// A shell that has lived as long has been used.
const USED: Duration = Duration::from_secs(1);
/// The first pause before a shell that takes the place of one that was not, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(16));

/// Has a shell on the console as long as the guest lives.
pub async fn keep(reaper: Arc<Reaper>) {
    if !Path::new(SHELL).exists() {
        tracing::warn!("no shell on the console: the initramfs has no {SHELL}, as the one for debugging has");
        return;
    }
    let mut last = Duration::ZERO;
    loop {
        let began = Instant::now();
        match run(&reaper).await {
            Ok(status) => tracing::debug!(status, "the console's shell has ended"),
            Err(error) => tracing::warn!(%error, "no shell on the console"),
        }
        last = pause(began.elapsed(), last);
        sleep(last).await;
    }
}

/// How long to wait for the next shell, after one that lived for `lived` and was waited for for `last`.
fn pause(lived: Duration, last: Duration) -> Duration {
    let (first, longest) = PAUSE;
    if lived >= USED { Duration::ZERO } else { (last * 2).clamp(first, longest) }
}

/// Runs one to its end, and answers its status. What it has started and left behind goes on.
async fn run(reaper: &Arc<Reaper>) -> Result<u32, Error> {
    let group = Path::new(cgroup::DEBUG).join("shell");
    match std::fs::create_dir(&group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::internal("make the shell's cgroup", &error));
        }
        _ => {}
    }
    let active = std::fs::read_to_string(ACTIVE).map_err(|e| Error::internal(format_args!("read {ACTIVE}"), &e))?;
    // The device itself: /dev/console would outlive the hang-up at a session's end, and two shells would read from it.
    let device = format!("/dev/{}", active.split_ascii_whitespace().next_back().unwrap_or("console"));
    let program = Program {
        args: &[SHELL.to_owned()],
        env: &environment(&[]),
        cwd: "/",
        group: &group,
        oom_score_adj: "0",
        terminal: Terminal::Device(&device),
    };
    let (_, exit) = launch(reaper, &program, Streams::default()).await?;
    // The reaper lives as long as the guest: it tells every exit.
    Ok(exit.await.map_or(0, |Exit { status, .. }| status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_that_was_used_is_replaced_at_once_and_others_ever_later() {
        let ms = Duration::from_millis;
        let cases = [
            (ms(0), ms(0), ms(250)),
            (ms(999), ms(250), ms(500)),
            (ms(10), ms(8000), ms(16_000)),
            (ms(10), ms(16_000), ms(16_000)),
            (ms(1000), ms(16_000), ms(0)),
            (ms(10), ms(0), ms(250)),
        ];
        for (lived, last, want) in cases {
            assert_eq!(pause(lived, last), want, "{lived:?} {last:?}");
        }
    }
}
