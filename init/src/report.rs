//! What PID 1 tells the host by itself: that it still turns, its log, and what its supervisor does. One connection carries it, the one of the
//! hello.
//!
//! Whoever has something to tell never waits: what the host does not take is kept up to a bound, and what is lost then is counted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use husk_protos::frame;
use husk_protos::report::report::What;
use husk_protos::report::{Heartbeat, LogLine, Report, SupervisorStatus};
use tokio::io::AsyncWrite;
use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::boot::boottime_ns;

/// Most bytes of lines that wait for the host, by [`weight`].
const WAITING_MAX: usize = 64 * 1024;

/// What there is to tell. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Reports(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    news: Notify,
    /// Everything has been told.
    told: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<LogLine>,
    bytes: usize,
    /// Lines lost since the last one that was kept.
    dropped: u64,
    /// Only the newest counts.
    supervisor: Option<SupervisorStatus>,
    /// Something was taken out of here, and is not on its way to the host as a whole yet.
    telling: bool,
}

/// What a line holds of memory, about.
fn weight(line: &LogLine) -> usize {
    let fields = line.fields.iter().map(|field| 64 + field.name.len() + field.value.len());
    128 + line.message.len() + fields.sum::<usize>()
}

impl Waiting {
    fn something(&self) -> bool {
        self.telling || self.supervisor.is_some() || !self.lines.is_empty()
    }

    fn push(&mut self, mut line: LogLine) {
        let weight = weight(&line);
        if self.bytes + weight > WAITING_MAX {
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
    /// Tells a line of the log.
    pub fn log(&self, line: LogLine) {
        self.waiting().push(line);
        self.0.news.notify_one();
    }

    /// Tells what the supervisor is doing now.
    pub fn supervisor(&self, status: SupervisorStatus) {
        self.waiting().supervisor = Some(status);
        self.0.news.notify_one();
    }

    /// The next line that the host has not been told, if any: for the console, when there is no way to the host.
    pub fn untold(&self) -> Option<LogLine> {
        self.waiting().pop()
    }

    /// Tells the host everything as it comes, and that the init turns once in each `heartbeat`, if there is one. Only comes back with what the
    /// connection failed of; dropping the future may cut a report short, so nothing can be told after it.
    pub async fn deliver(&self, host: &mut (impl AsyncWrite + Unpin), heartbeat: Option<Duration>) -> frame::Error {
        let mut heartbeat = heartbeat.map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            while let Some(what) = self.next() {
                if let Err(error) = tell(host, what).await {
                    return error;
                }
            }
            tokio::select! {
                // Holds a permit for news that came since the look above.
                () = self.0.news.notified() => {}
                () = tick(&mut heartbeat) => {
                    let beat = Heartbeat { uptime_ns: boottime_ns(), ..Default::default() };
                    if let Err(error) = tell(host, What::Heartbeat(beat)).await {
                        return error;
                    }
                }
            }
        }
    }

    fn next(&self) -> Option<What> {
        let mut waiting = self.waiting();
        let next = waiting.supervisor.take().map(What::Supervisor).or_else(|| waiting.pop().map(What::Log));
        waiting.telling = next.is_some();
        if next.is_none() {
            self.0.told.notify_waiters();
        }
        next
    }

    /// Comes back when the host has been told everything that there is, which may be never: it may not listen.
    pub async fn all_told(&self) {
        loop {
            // Before the look, or what is told right after it would not be noticed.
            let told = self.0.told.notified();
            if !self.waiting().something() {
                return;
            }
            told.await;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

async fn tick(heartbeat: &mut Option<Interval>) {
    match heartbeat {
        Some(ticks) => drop(ticks.tick().await),
        None => std::future::pending().await,
    }
}

async fn tell(host: &mut (impl AsyncWrite + Unpin), what: What) -> Result<(), frame::Error> {
    frame::write(host, &Report { what: Some(what), ..Default::default() }).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> LogLine {
        LogLine { message: message.into(), ..Default::default() }
    }

    #[test]
    fn what_nobody_takes_is_bounded_and_what_is_lost_is_counted() {
        let reports = Reports::default();
        let long = "x".repeat(1000);
        for _ in 0..1000 {
            reports.log(line(&long));
        }
        let mut kept = 0;
        while kept < 10 && reports.untold().is_some() {
            kept += 1;
        }
        reports.log(line("after"));
        let rest: Vec<LogLine> = std::iter::from_fn(|| reports.untold()).collect();
        let (last, before) = rest.split_last().unwrap();
        assert_eq!(last.message, "after");
        assert_eq!(last.dropped as usize + kept + before.len(), 1000);
        assert!(before.iter().all(|line| line.dropped == 0));
        assert_eq!(reports.waiting().bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn lines_come_in_order_between_heartbeats() {
        let (mut ours, mut theirs) = tokio::io::duplex(1024);
        let reports = Reports::default();
        reports.log(line("before anybody listens"));
        let deliver = {
            let reports = reports.clone();
            tokio::spawn(async move { reports.deliver(&mut ours, Some(Duration::from_secs(10))).await })
        };
        let mut told = Vec::new();
        for step in 0..4 {
            let report: Report = frame::read(&mut theirs).await.unwrap();
            told.push(match report.what {
                Some(What::Log(line)) => line.message,
                Some(What::Heartbeat(_)) => "beat".to_owned(),
                other => panic!("{other:?}"),
            });
            if step == 1 {
                reports.log(line("later"));
            }
        }
        assert_eq!(told, ["before anybody listens", "beat", "later", "beat"]);
        drop(theirs);
        assert!(matches!(deliver.await.unwrap(), frame::Error::Io(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn all_is_told_when_the_last_report_is_on_its_way() {
        // Less than a report: each is on its way for as long as it is not read.
        let (mut ours, mut theirs) = tokio::io::duplex(4);
        let reports = Reports::default();
        reports.all_told().await;
        reports.supervisor(SupervisorStatus { pid: 7, ..Default::default() });
        reports.log(line("last words"));
        let deliver = {
            let reports = reports.clone();
            tokio::spawn(async move { reports.deliver(&mut ours, None).await })
        };
        for _ in 0..2 {
            assert!(tokio::time::timeout(Duration::from_secs(60), reports.all_told()).await.is_err());
            frame::read::<Report>(&mut theirs).await.unwrap();
        }
        reports.all_told().await;
        deliver.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_interval_there_is_no_heartbeat() {
        let (mut ours, mut theirs) = tokio::io::duplex(1024);
        let reports = Reports::default();
        tokio::spawn(async move { reports.deliver(&mut ours, None).await });
        let nothing = tokio::time::timeout(Duration::from_secs(3600), frame::read::<Report>(&mut theirs)).await;
        assert!(nothing.is_err());
    }
}
