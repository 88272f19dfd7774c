//! Whom an exec's process becomes in a container with a user namespace.
//!
//! libcontainer's execs join every namespace of the container but that one. So libcontainer is given a process that is the guest's root with
//! all capabilities, and this does the rest at its end, in the process itself: join the user namespace, and only there take on the user, the
//! groups and the capabilities that were asked for. Until then the container's own processes, whose capabilities end with their namespace,
//! cannot touch it (ptrace(2), "Ptrace access mode checking"); from then on to its execve they cannot because libcontainer has made it not
//! dumpable.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::rc::Rc;

use libcontainer::capabilities::{drop_privileges, reset_effective};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::utils::get_user_home;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{LinuxCapabilities, Process, User};

use crate::error::chain;

/// A user in a user namespace.
#[derive(Debug, Clone)]
pub struct Identity {
    namespace: Rc<File>,
    wanted: Wanted,
}

/// What is taken out of a process's spec.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    user: User,
    capabilities: Option<LinuxCapabilities>,
    /// The spec sets HOME, which is otherwise the user's of the container's passwd(5).
    home: bool,
}

impl Identity {
    /// Takes the identity out of `process`, for the user namespace of the process with the pid `member`.
    ///
    /// # Errors
    /// When that is gone.
    pub fn take(process: &mut Process, member: i32) -> io::Result<Self> {
        let namespace = Rc::new(File::open(format!("/proc/{member}/ns/user"))?);
        Ok(Self { namespace, wanted: take(process) })
    }

    /// Joins the namespace and becomes the user.
    ///
    /// # Errors
    /// What could not be done, and why. The process is not to run then.
    pub fn assume(&self) -> Result<(), String> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: nix::Error| format!("{what}: {}", e.desc().to_lowercase())
        };
        let Wanted { user, capabilities, .. } = &self.wanted;
        // It gives all capabilities in the namespace, and none outside.
        setns(&self.namespace, CloneFlags::CLONE_NEWUSER).map_err(failed("join the user namespace"))?;
        let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
        setgroups(&groups).map_err(failed("process.user.additionalGids: set the groups"))?;
        let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
        setresgid(gid, gid, gid).map_err(failed(&format!("process.user.gid: become group {gid}")))?;
        // A namespace may map the guest's root, from which a change takes the capabilities away.
        set_keepcaps(true).map_err(failed("keep the capabilities"))?;
        setresuid(uid, uid, uid).map_err(failed(&format!("process.user.uid: become user {uid}")))?;
        set_keepcaps(false).map_err(failed("keep the capabilities"))?;
        let syscall = create_syscall();
        reset_effective(syscall.as_ref())
            .and_then(|()| capabilities.as_ref().map_or(Ok(()), |some| drop_privileges(some, syscall.as_ref())))
            .map_err(|e| format!("process.capabilities: {}", chain(&e)))
    }

    /// Corrects the HOME that libcontainer has looked up for the guest's root.
    pub fn correct_home(&self, environment: &mut HashMap<String, String>) {
        if self.wanted.home {
            return;
        }
        environment.remove("HOME");
        if let Some(home) = get_user_home(self.wanted.user.uid()).as_ref().and_then(|home| home.to_str()) {
            environment.insert("HOME".into(), home.into());
        }
    }
}

/// Leaves the guest's root with all capabilities, and its umask.
fn take(process: &mut Process) -> Wanted {
    let user = process.user().clone();
    let capabilities = process.capabilities().clone();
    let set = |entry: &String| entry.strip_prefix("HOME=").is_some_and(|value| !value.is_empty());
    let home = process.env().iter().flatten().any(set);
    let mut root = User::default();
    root.set_uid(0).set_gid(0).set_umask(user.umask());
    process.set_user(root).set_capabilities(None);
    Wanted { user, capabilities, home }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn libcontainer_gets_the_guests_root_and_nothing_is_lost() {
        let whole = json!({
            "user": {"uid": 7, "gid": 8, "additionalGids": [9], "umask": 63},
            "capabilities": {"bounding": ["CAP_KILL"]},
            "args": ["id"], "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true
        });
        let mut process: Process = serde_json::from_value(whole).unwrap();
        let wanted = take(&mut process);
        assert_eq!((wanted.user.uid(), wanted.user.gid()), (7, 8));
        assert_eq!(wanted.user.additional_gids().as_deref(), Some(&[9][..]));
        assert!(wanted.capabilities.is_some() && !wanted.home);
        let left: Value = serde_json::to_value(&process).unwrap();
        let root = json!({
            "user": {"uid": 0, "gid": 0, "umask": 63}, "args": ["id"], "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true
        });
        assert_eq!(left, root);
    }

    #[test]
    fn a_home_of_the_specs_own_stays() {
        for (env, set) in [(json!(["HOME=/x"]), true), (json!(["HOME="]), false), (json!(["HOMELAND=/x"]), false)] {
            let process = json!({"user": {"uid": 7, "gid": 8}, "args": ["id"], "cwd": "/", "env": env});
            assert_eq!(take(&mut serde_json::from_value(process).unwrap()).home, set, "{env}");
        }
    }
}
