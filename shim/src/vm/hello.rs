//! The wait of a boot: for the guest's hello, for the end of one of the VM's processes, or for the deadline.

use std::time::Duration;

use husk_protos::system::Hello;
use husk_vsock::Stream;

use super::error::BootError;
use super::processes::{CONSOLE_DEADLINE, CONSOLE_LINES, MACHINE_DELAY, Processes};
use crate::guest::link::{HostPort, LinkError};

impl Processes {
    /// The guest's hello, and the connection on which its reports follow.
    pub(super) async fn hello(&self, ready: &mut HostPort, deadline: Duration) -> Result<(Stream, Hello), BootError> {
        tokio::select! {
            hello = receive(ready) => match hello {
                Ok(hello) => Ok(hello),
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
            () = tokio::time::sleep(deadline) => {
                Err(BootError::Deadline { deadline, console: self.console.tail(CONSOLE_LINES) })
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
        let mut last = self.console.tail(CONSOLE_LINES);
        for log in &self.logs {
            last = format!("{last}\n{}", log.tail(MACHINE_DELAY).await).trim().to_owned();
        }
        BootError::Ended { cause, console: last }
    }
}

async fn receive(ready: &mut HostPort) -> Result<(Stream, Hello), BootError> {
    let mut stream = ready.accept().await.map_err(LinkError::from)?;
    let hello = husk_protos::frame::read(&mut stream).await?;
    Ok((stream, hello))
}
