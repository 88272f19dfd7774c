//! Copies the changes of a container's overlay back to the filesystem below it.

use std::time::Duration;

use husk_protos::bundle::{CopyBackRequest, CopyBackResponse, DiskFolder};

use super::Tasks;
use crate::error::CallError;
use crate::paths;
use crate::worker::copy_back::{Folder, Report};
use crate::worker::{Reply, Request};

impl Tasks {
    /// Has a worker apply the upper layer of a container's root. The worker is killed if it takes too long.
    pub(crate) async fn copy_back(&self, request: CopyBackRequest) -> Result<CopyBackResponse, CallError> {
        paths::check_id(&request.id)?;
        let folder = |place: Option<DiskFolder>| {
            let DiskFolder { disk, path, .. } = place.unwrap_or_default();
            Folder { disk, path }
        };
        let (upper, target) = (folder(request.upper.into_option()), folder(request.target.into_option()));
        let limit = Duration::from_millis(request.timeout_ms);
        let creation = self.reaper.creation();
        match self.workers.copy(&creation, &Request::CopyBack { upper, target }, limit).await? {
            Reply::CopiedBack(report) => Ok(response(report)),
            other => Err(other.unexpected(&format!("copy back {}", request.id))),
        }
    }
}

fn response(report: Report) -> CopyBackResponse {
    let Report { entries, bytes, failed, failure, rejected, rejection } = report;
    CopyBackResponse { entries, bytes, failed, failure, rejected, rejection, ..Default::default() }
}
