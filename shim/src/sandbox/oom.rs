//! How eagerly the host's OOM killer takes the VM's processes. As runc does for a container's process, the spec decides,
//! and not the protection that containerd has.

use husk_protos::chain::Chain;
use husk_protos::lock::lock;

use crate::sandbox::error::SandboxError;
use crate::sandbox::registry::{Sandbox, Scores};
use crate::vm::Vm;

/// The VM's score: that of its most important container. Without a score, a container is as important as a program that
/// is started on the host, whose score is 0.
fn of_vm(scores: &Scores) -> Option<i32> {
    let given = scores.values().any(Option::is_some);
    given.then(|| scores.values().map(|score| score.unwrap_or_default()).min().unwrap_or_default())
}

impl Sandbox {
    /// Adds a container's score.
    pub(super) fn add_oom_score(&self, id: &str, score: Option<i32>, vm: &Vm) -> Result<(), SandboxError> {
        let of_vm = {
            let mut scores = lock(&self.oom_scores);
            scores.insert(id.to_owned(), score);
            of_vm(&scores)
        };
        vm.set_oom_score(of_vm).map_err(|error| {
            SandboxError::Internal(format!(
                "process.oomScoreAdj {}: set it for the VM's processes: {error}",
                shown(score)
            ))
        })
    }

    /// Removes a container's score.
    pub(super) fn remove_oom_score(&self, id: &str) {
        let of_vm = {
            let mut scores = lock(&self.oom_scores);
            let removed = scores.remove(id);
            removed.map(|_| of_vm(&scores))
        };
        if let (Some(score), Ok(vm)) = (of_vm, self.live_vm())
            && let Err(error) = vm.set_oom_score(score)
        {
            tracing::warn!(container = id, error = %Chain(&error), "failed to change the OOM score of the VM's processes");
        }
    }
}

fn shown(score: Option<i32>) -> String {
    score.map_or_else(|| "(none)".to_owned(), |score| score.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_as_important_as_its_most_important_container() {
        for (scores, expected) in [
            (&[][..], None),
            (&[None, None], None),
            (&[Some(500)], Some(500)),
            (&[Some(500), Some(-10), Some(3)], Some(-10)),
            (&[Some(500), None], Some(0)),
            (&[Some(-500), None], Some(-500)),
        ] {
            let scores = scores.iter().enumerate().map(|(n, score)| (n.to_string(), *score)).collect();
            assert_eq!(of_vm(&scores), expected, "{scores:?}");
        }
    }
}
