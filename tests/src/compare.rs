//! Runs one observation under husk and under runc.

use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

use crate::artifacts::{Runtime, Version};
use crate::containerd::{Containerd, Setup};

/// The shared daemon of [`same`] whose shims are those under test.
pub fn tested() -> Result<&'static Containerd> {
    Containerd::shared_of(Version::V2_1)
}

/// A shared daemon whose shims are runc's.
pub fn runc() -> Result<&'static Containerd> {
    static RUNC: OnceLock<Result<Containerd, String>> = OnceLock::new();
    let setup = || Setup { version: Some(Version::V2_1), runtime: Some(Runtime::Runc), ..Setup::default() };
    RUNC.get_or_init(|| Containerd::with(setup()).map_err(|e| format!("{e:?}"))).as_ref().map_err(|e| anyhow!("{e}"))
}

/// Runs `observe` under husk and under runc, which must return the same. Returns that.
pub fn same(observe: impl Fn(&'static Containerd) -> Result<String>) -> Result<String> {
    let husk = observe(tested()?).context("under husk")?;
    let runc = observe(runc()?).context("under runc")?;
    ensure!(husk == runc, "husk:\n{husk}\nrunc:\n{runc}");
    Ok(husk)
}
