//! The user and group IDs that VMs may have, and whose IDs they are otherwise.

use std::fmt;
use std::ops::RangeInclusive;

/// root, nobody, and the 16 and 32 bits that mean "no change" (chown(2)).
const SPECIAL: [u32; 4] = [0, 65534, 65535, u32::MAX];

/// IDs that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    last: u32,
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.first, self.last - self.first + 1)
    }
}

impl Default for IdRange {
    /// As many as the kernel's vsock device has CIDs. systemd leaves these IDs to nobody (its docs/UIDS-GIDS.md); they are
    /// above those that SSSD gives to users of a directory, and net.ipv4.ping_group_range can contain them.
    fn default() -> Self {
        Self { first: 0x7f00_0000, last: 0x7f00_ffff }
    }
}

impl IdRange {
    /// Parses `FIRST:COUNT`, the form of /etc/subuid (subuid(5)).
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let numbers = text.split_once(':').and_then(|(first, count)| Some((number(first)?, number(count)?)));
        let (first, count) = numbers.ok_or("must be a string \"FIRST:COUNT\" of two numbers")?;
        let last = count.checked_sub(1).and_then(|more| first.checked_add(more));
        let range = Self { first, last: last.ok_or("must contain at least one ID, and none above 4294967294")? };
        match SPECIAL.into_iter().find(|id| range.numbers().contains(id)) {
            Some(id) => Err(format!("must not contain {id}, which has a meaning of its own")),
            None => Ok(range),
        }
    }

    /// The IDs.
    pub(crate) fn numbers(self) -> RangeInclusive<u32> {
        self.first..=self.last
    }

    /// The first line of an account file that has some of the IDs: of /etc/passwd or /etc/group, or, if `subordinate`, of
    /// /etc/subuid or /etc/subgid.
    pub(crate) fn conflict(self, file: &str, subordinate: bool) -> Option<&str> {
        file.lines().find(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let (first, count) = match (subordinate, &fields[..]) {
                (true, [_, first, count]) => (number(first), number(count)),
                (false, [_, _, id, ..]) => (number(id), Some(1)),
                _ => return false,
            };
            let (Some(first), Some(more)) = (first, count.and_then(|count| count.checked_sub(1))) else { return false };
            first <= self.last && first.saturating_add(more) >= self.first
        })
    }
}

/// Unlike the standard parser, without a plus sign.
fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed_and_shown_as_in_subuid() {
        let range = IdRange::parse("100000:65536").unwrap();
        assert_eq!(range.numbers(), 100_000..=165_535);
        assert_eq!(range.to_string(), "100000:65536");
        assert_eq!(IdRange::default().to_string(), "2130706432:65536");
        assert_eq!(IdRange::parse("4294967294:1").unwrap().numbers(), u32::MAX - 1..=u32::MAX - 1);
        for (text, why) in [
            ("nobody", "must be a string"),
            ("+5:1", "must be a string"),
            ("5:", "must be a string"),
            ("5:0", "must contain at least one ID"),
            ("4294967295:2", "must contain at least one ID, and none above"),
            ("4294967295:1", "must not contain 4294967295"),
            ("0:1000", "must not contain 0"),
            ("60000:10000", "must not contain 65534"),
        ] {
            let error = IdRange::parse(text).unwrap_err();
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }

    #[test]
    fn accounts_with_some_of_the_ids_are_found() {
        let range = IdRange::parse("1000:100").unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\n\nbroken\nab:x:1099:5::/:/bin/sh";
        assert_eq!(range.conflict(passwd, false), Some("ab:x:1099:5::/:/bin/sh"));
        assert_eq!(range.conflict("a:x:999:\nb:x:1100:\nc:x:-1:\n", false), None);
        for (line, conflicts) in [
            ("a:900:100", false),
            ("a:900:101", true),
            ("a:1099:1", true),
            ("a:1100:65536", false),
            ("a:0:4294967295", true),
            ("a:1000:0", false),
            ("a:1000", false),
        ] {
            assert_eq!(range.conflict(line, true).is_some(), conflicts, "{line}");
        }
    }
}
