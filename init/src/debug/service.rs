//! The Debug service: maps calls to the processes.

use std::sync::Arc;

use async_trait::async_trait;
use husk_protos::debug::{Process, StartProcessRequest};
use husk_protos::debug_ttrpc::Debug;
use ttrpc::r#async::TtrpcContext;

use super::process::{ProcessSpec, Processes};
use crate::io::Size;
use crate::rpc::{handle, handle_uninterrupted};

pub(super) struct DebugService(pub(super) Arc<Processes>);

fn size(height: u32, width: u32) -> Size {
    let clamp = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    Size { height: clamp(height), width: clamp(width) }
}

#[async_trait]
impl Debug for DebugService {
    async fn start(&self, _: &TtrpcContext, request: StartProcessRequest) -> ttrpc::Result<Process> {
        let processes = self.0.clone();
        handle_uninterrupted(async move {
            let terminal = request.terminal.then(|| size(request.height, request.width));
            let StartProcessRequest { args, env, cwd, stdin, .. } = request;
            let (id, pid) = processes.start(ProcessSpec { args, env, cwd, terminal, stdin }).await?;
            Ok(Process { id, pid: pid as u32, ..Default::default() })
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, process: Process) -> ttrpc::Result<Process> {
        handle(async {
            let exit_status = self.0.wait(&process.id).await?;
            Ok(Process { exit_status, ..Default::default() })
        })
        .await
    }

    async fn resize(&self, _: &TtrpcContext, process: Process) -> ttrpc::Result<Process> {
        let resized = self.0.resize(&process.id, size(process.height, process.width));
        Ok(resized.map(|()| Process::new())?)
    }

    async fn signal(&self, _: &TtrpcContext, process: Process) -> ttrpc::Result<Process> {
        Ok(self.0.signal(&process.id, process.signal).map(|()| Process::new())?)
    }

    async fn end(&self, _: &TtrpcContext, process: Process) -> ttrpc::Result<Process> {
        let processes = self.0.clone();
        handle_uninterrupted(async move { processes.end(&process.id).await.map(|()| Process::new()) }).await
    }
}
