//! Whether the user IDs of VMs belong to others too: a process of theirs could then reach the VMs with these IDs.

use std::fs;
use std::io;
use std::path::Path;

use crate::config::ids::IdRange;
use crate::config::problem::Problem;

/// The host's account files, and whether they name ranges. Accounts of a directory service are not in them.
const FILES: [(&str, bool); 4] = [("passwd", false), ("group", false), ("subuid", true), ("subgid", true)];

/// Checks the key `vm_ids` against the account files in the folder `accounts`.
pub(super) fn check(ids: IdRange, accounts: &Path) -> Result<(), Problem> {
    let problem = |why| Problem { key: "vm_ids".to_owned(), value: Some(format!("\"{ids}\"")), why };
    for (name, subordinate) in FILES {
        let path = accounts.join(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(problem(format!("read {}: {error}", path.display()))),
        };
        if let Some(line) = ids.conflict(&String::from_utf8_lossy(&text), subordinate) {
            return Err(problem(format!("{} has some of these IDs: {line:?}; choose IDs of nobody", path.display())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_accounts_are_rejected_with_the_line_that_has_them() {
        let accounts = tempfile::tempdir().unwrap();
        let ids = IdRange::parse("100000:10").unwrap();
        assert!(check(ids, accounts.path()).is_ok(), "without account files");
        fs::write(accounts.path().join("passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(accounts.path().join("subgid"), "user:65536:65536\n").unwrap();
        let problem = check(ids, accounts.path()).unwrap_err().to_string();
        let path = accounts.path().join("subgid");
        let expected = format!(
            "vm_ids = \"100000:10\": {} has some of these IDs: \"user:65536:65536\"; choose IDs of nobody",
            path.display()
        );
        assert_eq!(problem, expected);
    }
}
