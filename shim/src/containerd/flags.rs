//! The command line of a shim: flags in Go's syntax (`-namespace default`, `-namespace=default`, `-debug`), followed by
//! the action (containerd, pkg/shim/shim.go).

use std::ffi::OsString;

use go_flag::FlagError;

/// The command line.
#[derive(Debug, Default)]
pub struct Flags {
    /// Log at debug level.
    pub debug: bool,
    /// containerd's namespace.
    pub namespace: String,
    /// The task's id; the server's is the sandbox's.
    pub id: String,
    /// The server's socket.
    pub socket: String,
    /// The bundle; empty for the working directory.
    pub bundle: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// `start`, `delete`, or empty for the server.
    pub action: String,
    /// Print the version and exit.
    pub version: bool,
    /// Print the runtime's properties and exit.
    pub info: bool,
}

impl Flags {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// An unknown flag, or one without its value.
    pub fn parse(arguments: &[OsString]) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut short_version = false;
        // containerd passes its own path. It serves shims that publish events by running containerd; husk uses TTRPC.
        let mut publish_binary = String::new();
        let positional: Vec<String> = go_flag::parse_args(arguments, |set| {
            set.add_flag("debug", &mut flags.debug);
            set.add_flag("v", &mut short_version);
            set.add_flag("version", &mut flags.version);
            set.add_flag("namespace", &mut flags.namespace);
            set.add_flag("id", &mut flags.id);
            set.add_flag("socket", &mut flags.socket);
            set.add_flag("bundle", &mut flags.bundle);
            set.add_flag("address", &mut flags.address);
            set.add_flag("publish-binary", &mut publish_binary);
            set.add_flag("info", &mut flags.info);
        })?;
        flags.version |= short_version;
        flags.action = positional.into_iter().next().unwrap_or_default();
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Flags, String> {
        Flags::parse(&arguments.iter().map(OsString::from).collect::<Vec<_>>()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_flag_that_containerd_passes_is_accepted() {
        let flags = parse(&[
            "-debug",
            "-namespace",
            "default",
            "-id=web",
            "--address",
            "/run/c.sock",
            "-publish-binary",
            "/bin/containerd",
            "-bundle",
            "/b",
            "-socket",
            "/s",
            "delete",
            "-ignored",
        ])
        .unwrap();
        assert!(flags.debug && !flags.version && !flags.info);
        let texts = [&flags.namespace, &flags.id, &flags.address, &flags.bundle, &flags.socket, &flags.action];
        assert_eq!(texts, ["default", "web", "/run/c.sock", "/b", "/s", "delete"]);
    }

    #[test]
    fn without_an_action_the_shim_is_a_server() {
        assert_eq!(parse(&["-id", "web"]).unwrap().action, "");
    }

    #[test]
    fn both_forms_of_the_version_flag_work() {
        for flag in ["-v", "-version", "--version"] {
            assert!(parse(&[flag]).unwrap().version, "{flag}");
        }
        assert!(parse(&["-info"]).unwrap().info);
    }

    #[test]
    fn unknown_flags_and_missing_values_are_rejected() {
        for (arguments, named) in [(["-unknown", "x"], "unknown"), (["-debug", "-id"], "id")] {
            let error = parse(&arguments).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
