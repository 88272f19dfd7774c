//! The default environment of debug mode's programs.

/// Variables that a program gets unless its caller sets them. Every terminal understands the codes of a vt100.
const DEFAULTS: [(&str, &str); 3] = [("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("HOME", "/"), ("TERM", "vt100")];

/// Adds the missing defaults to `given`.
pub(super) fn environment(given: &[String]) -> Vec<String> {
    let has = |name: &str| given.iter().any(|one| one.split_once('=').is_some_and(|(given, _)| given == name));
    let missing = DEFAULTS.iter().filter(|(name, _)| !has(name));
    given.iter().cloned().chain(missing.map(|(name, value)| format!("{name}={value}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_do_not_override_the_callers_variables() {
        let given = ["TERM=xterm", "PATHS=x", "HOME="].map(String::from);
        let expected = ["TERM=xterm", "PATHS=x", "HOME=", "PATH=/bin:/sbin:/usr/bin:/usr/sbin"];
        assert_eq!(environment(&given), expected);
    }
}
