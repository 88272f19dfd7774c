//! What PID 1 reports to the host on its own: heartbeats, log lines and the supervisor's status. All share one
//! connection, that of the Hello.
//!
//! Callers never wait. Reports that the host does not read are queued up to a bound; lines lost beyond it are counted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::frame::{self, FrameError};
use husk_protos::lock::lock;
use husk_protos::report::report::What;
use husk_protos::report::{Heartbeat, LogLine, Report, SupervisorStatus};
use tokio::io::AsyncWrite;
use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::clock::{boottime_ns, realtime_ns};

/// Limit of the queued lines, bytes, measured by [`weight`].
const QUEUE_MAX: usize = 64 * 1024;

/// Reports for the host. Clones share one queue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reports(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something was queued.
    queued: Notify,
    /// The queue became empty and its last report was sent.
    flushed: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<LogLine>,
    bytes: usize,
    /// Lines lost since the last line that was queued.
    dropped: u64,
    /// The newest status, if it has not been sent.
    supervisor: Option<SupervisorStatus>,
    /// A report has left the queue and may not be sent completely.
    sending: bool,
}

/// Approximate memory use of a line, bytes.
fn weight(line: &LogLine) -> usize {
    let fields = line.fields.iter().map(|field| 64 + field.name.len() + field.value.len());
    128 + line.message.len() + fields.sum::<usize>()
}

impl Queue {
    fn is_flushed(&self) -> bool {
        !self.sending && self.supervisor.is_none() && self.lines.is_empty()
    }

    fn push(&mut self, mut line: LogLine) {
        let weight = weight(&line);
        if self.bytes + weight > QUEUE_MAX {
            self.dropped += 1;
            return;
        }
        line.dropped = std::mem::take(&mut self.dropped);
        self.bytes += weight;
        self.lines.push_back(line);
    }

    fn pop(&mut self) -> Option<LogLine> {
        let line = self.lines.pop_front()?;
        self.bytes -= weight(&line);
        Some(line)
    }
}

impl Reports {
    pub(crate) fn log(&self, line: LogLine) {
        self.queue().push(line);
        self.0.queued.notify_one();
    }

    /// Reports the supervisor's status. A newer status replaces one that has not been sent.
    pub(crate) fn supervisor(&self, status: SupervisorStatus) {
        self.queue().supervisor = Some(status);
        self.0.queued.notify_one();
    }

    /// Takes the next line that was not sent, for the console when the host is unreachable.
    pub(crate) fn undelivered(&self) -> Option<LogLine> {
        self.queue().pop()
    }

    /// Sends reports as they are queued, and a heartbeat once per interval, if there is one. Returns only when the
    /// connection fails. Dropping the future may leave a partial report on the connection, which is unusable then.
    pub(crate) async fn deliver(
        &self,
        host: &mut (impl AsyncWrite + Unpin),
        heartbeat: Option<Duration>,
    ) -> FrameError {
        let mut heartbeat = heartbeat.map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            while let Some(what) = self.next() {
                if let Err(error) = send(host, what).await {
                    return error;
                }
            }
            tokio::select! {
                // Stores a permit, so that a report queued after the loop above is not missed.
                () = self.0.queued.notified() => {}
                () = tick(&mut heartbeat) => {
                    let beat = Heartbeat { uptime_ns: boottime_ns(), realtime_ns: realtime_ns(), ..Default::default() };
                    if let Err(error) = send(host, What::Heartbeat(beat)).await {
                        return error;
                    }
                }
            }
        }
    }

    fn next(&self) -> Option<What> {
        let mut queue = self.queue();
        let next = queue.supervisor.take().map(What::Supervisor).or_else(|| queue.pop().map(What::Log));
        queue.sending = next.is_some();
        if next.is_none() {
            self.0.flushed.notify_waiters();
        }
        next
    }

    /// Waits until every report has been sent. May never return: the host may not read.
    pub(crate) async fn flush(&self) {
        loop {
            // Register before checking: a flush in between would be missed.
            let flushed = self.0.flushed.notified();
            if self.queue().is_flushed() {
                return;
            }
            flushed.await;
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.0.queue)
    }
}

async fn tick(heartbeat: &mut Option<Interval>) {
    match heartbeat {
        Some(ticks) => drop(ticks.tick().await),
        None => std::future::pending().await,
    }
}

async fn send(host: &mut (impl AsyncWrite + Unpin), what: What) -> Result<(), FrameError> {
    frame::write(host, &Report { what: Some(what), ..Default::default() }).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> LogLine {
        LogLine { message: message.into(), ..Default::default() }
    }

    #[test]
    fn the_queue_is_bounded_and_lost_lines_are_counted() {
        let reports = Reports::default();
        let long = "x".repeat(1000);
        for _ in 0..1000 {
            reports.log(line(&long));
        }
        let mut kept = 0;
        while kept < 10 && reports.undelivered().is_some() {
            kept += 1;
        }
        reports.log(line("after"));
        let rest: Vec<LogLine> = std::iter::from_fn(|| reports.undelivered()).collect();
        let (last, before) = rest.split_last().unwrap();
        assert_eq!(last.message, "after");
        assert_eq!(last.dropped as usize + kept + before.len(), 1000);
        assert!(before.iter().all(|line| line.dropped == 0));
        assert_eq!(reports.queue().bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn log_lines_arrive_in_order_between_heartbeats() {
        let (mut ours, mut theirs) = tokio::io::duplex(1024);
        let reports = Reports::default();
        reports.log(line("before the host reads"));
        let deliver = {
            let reports = reports.clone();
            tokio::spawn(async move { reports.deliver(&mut ours, Some(Duration::from_secs(10))).await })
        };
        let mut received = Vec::new();
        for step in 0..4 {
            let report: Report = frame::read(&mut theirs).await.unwrap();
            received.push(match report.what {
                Some(What::Log(line)) => line.message,
                Some(What::Heartbeat(_)) => "beat".to_owned(),
                other => panic!("{other:?}"),
            });
            if step == 1 {
                reports.log(line("later"));
            }
        }
        assert_eq!(received, ["before the host reads", "beat", "later", "beat"]);
        drop(theirs);
        assert!(matches!(deliver.await.unwrap(), FrameError::Io(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_flush_waits_until_the_last_report_is_sent() {
        // Smaller than a report: sending one does not finish until it is read.
        let (mut ours, mut theirs) = tokio::io::duplex(4);
        let reports = Reports::default();
        reports.flush().await;
        reports.supervisor(SupervisorStatus { pid: 7, ..Default::default() });
        reports.log(line("last line"));
        let deliver = {
            let reports = reports.clone();
            tokio::spawn(async move { reports.deliver(&mut ours, None).await })
        };
        for _ in 0..2 {
            assert!(tokio::time::timeout(Duration::from_secs(60), reports.flush()).await.is_err());
            frame::read::<Report>(&mut theirs).await.unwrap();
        }
        reports.flush().await;
        deliver.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn no_heartbeat_is_sent_without_an_interval() {
        let (mut ours, mut theirs) = tokio::io::duplex(1024);
        let reports = Reports::default();
        tokio::spawn(async move { reports.deliver(&mut ours, None).await });
        let nothing = tokio::time::timeout(Duration::from_secs(3600), frame::read::<Report>(&mut theirs)).await;
        assert!(nothing.is_err());
    }
}
