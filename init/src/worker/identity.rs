//! The user of an exec in a container with a user namespace.
//!
//! libcontainer's execs join every namespace of the container except the user namespace. So libcontainer receives a
//! process of the guest's root with all capabilities. As the last step before execve, the process itself joins the user
//! namespace and assumes the requested user, groups and capabilities. Until then the container's processes cannot
//! access it, because their capabilities are limited to their namespace (ptrace(2), "Ptrace access mode checking");
//! after that they cannot because libcontainer has made it non-dumpable.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::rc::Rc;

use husk_protos::chain::Chain;
use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::utils::get_user_home;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{LinuxCapabilities, Process, User};

/// A user in a user namespace.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    namespace: Rc<File>,
    credentials: Credentials,
}

/// The credentials from a process's spec.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Credentials {
    user: User,
    capabilities: Option<LinuxCapabilities>,
    /// Whether the spec sets HOME. If not, HOME comes from the container's passwd(5).
    sets_home: bool,
}

impl Identity {
    /// Moves the credentials out of `process`, to be assumed in the user namespace of the process `pid`.
    pub(super) fn take(process: &mut Process, pid: i32) -> io::Result<Self> {
        let namespace = Rc::new(File::open(format!("/proc/{pid}/ns/user"))?);
        Ok(Self { namespace, credentials: take_credentials(process) })
    }

    /// Joins the namespace and assumes the credentials. If this fails, the process must not run.
    pub(super) fn assume(&self) -> Result<(), String> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: nix::Error| format!("{what}: {}", e.desc().to_lowercase())
        };
        let Credentials { user, capabilities, .. } = &self.credentials;
        // Joining grants all capabilities inside the namespace and none outside.
        setns(&self.namespace, CloneFlags::CLONE_NEWUSER).map_err(failed("join the user namespace"))?;
        let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
        setgroups(&groups).map_err(failed("process.user.additionalGids: set the groups"))?;
        let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
        setresgid(gid, gid, gid).map_err(failed(&format!("process.user.gid: become group {gid}")))?;
        // If the namespace maps the guest's root, changing away from it would clear the capabilities.
        set_keepcaps(true).map_err(failed("keep the capabilities"))?;
        setresuid(uid, uid, uid).map_err(failed(&format!("process.user.uid: become user {uid}")))?;
        set_keepcaps(false).map_err(failed("keep the capabilities"))?;
        let syscall = create_syscall();
        reset_effective(syscall.as_ref())
            .and_then(|()| capabilities.as_ref().map_or(Ok(()), |some| drop_privileges(some, syscall.as_ref())))
            .map_err(|e| format!("process.capabilities: {}", Chain(&e)))
    }

    /// Corrects HOME, which libcontainer has set to the home directory of the guest's root.
    pub(super) fn correct_home(&self, environment: &mut HashMap<String, String>) {
        if self.credentials.sets_home {
            return;
        }
        environment.remove("HOME");
        if let Some(home) = get_user_home(self.credentials.user.uid()).as_ref().and_then(|home| home.to_str()) {
            environment.insert("HOME".into(), home.into());
        }
    }
}

/// Moves the credentials out of a process. It keeps its umask, and runs as the guest's root with all capabilities.
fn take_credentials(process: &mut Process) -> Credentials {
    let user = process.user().clone();
    let capabilities = process.capabilities().clone();
    let is_home = |entry: &String| entry.strip_prefix("HOME=").is_some_and(|value| !value.is_empty());
    let sets_home = process.env().iter().flatten().any(is_home);
    let mut root = User::default();
    root.set_uid(0).set_gid(0).set_umask(user.umask());
    process.set_user(root).set_capabilities(None);
    Credentials { user, capabilities, sets_home }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn credentials_are_replaced_by_the_guests_root_and_the_rest_is_kept() {
        let whole = json!({
            "user": {"uid": 7, "gid": 8, "additionalGids": [9], "umask": 63},
            "capabilities": {"bounding": ["CAP_KILL"]},
            "args": ["id"], "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true
        });
        let mut process: Process = serde_json::from_value(whole).unwrap();
        let credentials = take_credentials(&mut process);
        assert_eq!((credentials.user.uid(), credentials.user.gid()), (7, 8));
        assert_eq!(credentials.user.additional_gids().as_deref(), Some(&[9][..]));
        assert!(credentials.capabilities.is_some() && !credentials.sets_home);
        let rest: Value = serde_json::to_value(&process).unwrap();
        let root = json!({
            "user": {"uid": 0, "gid": 0, "umask": 63}, "args": ["id"],
            "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true
        });
        assert_eq!(rest, root);
    }

    #[test]
    fn home_counts_as_set_only_if_it_has_a_value() {
        for (env, set) in [(json!(["HOME=/x"]), true), (json!(["HOME="]), false), (json!(["HOMELAND=/x"]), false)] {
            let process = json!({"user": {"uid": 7, "gid": 8}, "args": ["id"], "cwd": "/", "env": env});
            let credentials = take_credentials(&mut serde_json::from_value(process).unwrap());
            assert_eq!(credentials.sets_home, set, "{env}");
        }
    }
}
