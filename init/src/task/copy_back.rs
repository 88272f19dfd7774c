//! Copies the changes of a container's overlay back to the filesystem below it.

use std::time::Duration;

use husk_protos::bundle::{CopyBackRequest, CopyBackResponse, DiskFolder};
use tokio::time::{Instant, timeout};

use super::Tasks;
use crate::error::{CallError, FailureKind};
use crate::paths;
use crate::worker::copy_back::{Folder, Images, Report, is_nothing};
use crate::worker::{Reply, Request};

impl Tasks {
    /// Has a worker apply the upper layer of a container's root, unless there is nothing to apply. The worker is killed if
    /// it takes too long.
    pub(crate) async fn copy_back(&self, request: CopyBackRequest) -> Result<CopyBackResponse, CallError> {
        paths::check_id(&request.id)?;
        let folder = |DiskFolder { disk, path, .. }| Folder { disk, path };
        let upper = folder(request.upper.unwrap_or_default());
        let target = folder(request.target.unwrap_or_default());
        let images = request.merged.into_option().map(|merged| Images { merged: folder(merged), last: request.last });
        let (started, limit) = (Instant::now(), Duration::from_millis(request.timeout_ms));
        // On a thread: the folders are on a disk and in the share, and PID 1 must send heartbeats meanwhile.
        let looked = {
            let (upper, target) = (upper.clone(), target.clone());
            tokio::task::spawn_blocking(move || is_nothing(&upper, &target))
        };
        let what = "look for changes to copy back";
        let late = |_| CallError::new(FailureKind::DeadlineExceeded, format!("{what}: no answer within {limit:?}"));
        let nothing = timeout(limit, looked).await.map_err(late)?;
        if nothing.map_err(|error| CallError::internal(what, &error))?? {
            return Ok(CopyBackResponse::new());
        }
        let limit = limit.saturating_sub(started.elapsed());
        let creation = self.reaper.creation();
        match self.workers.copy(&creation, &Request::CopyBack { upper, target, images }, limit).await? {
            Reply::CopiedBack(report) => Ok(response(report)),
            other => Err(other.unexpected(&format!("copy back {}", request.id))),
        }
    }
}

fn response(report: Report) -> CopyBackResponse {
    let Report { entries, bytes, failed, failure, rejected, rejection } = report;
    CopyBackResponse { entries, bytes, failed, failure, rejected, rejection, ..Default::default() }
}
