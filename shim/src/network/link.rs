//! A pod's link, and the name of its tap.

/// Names of taps are this and the index of the pod's link: unique in a namespace, and at most 15 bytes.
const TAP_PREFIX: &str = "husk-";

/// A link of the pod that the VM is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    /// Bytes.
    pub(super) mtu: u32,
    pub(super) up: bool,
}

/// The name of the tap of the link with this index.
pub(super) fn tap_name(link_index: u32) -> String {
    format!("{TAP_PREFIX}{link_index}")
}

/// Whether a name is one of husk's taps.
pub(super) fn is_tap(name: &str) -> bool {
    let index = name.strip_prefix(TAP_PREFIX).unwrap_or_default();
    !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_recognized_by_name() {
        // The largest index.
        let name = tap_name(i32::MAX.unsigned_abs());
        assert_eq!(name.len(), 15);
        assert!(is_tap(&name));
        for other in ["husk-", "husk-a", "husk0", "eth0", "husk-1a"] {
            assert!(!is_tap(other), "{other}");
        }
    }
}
