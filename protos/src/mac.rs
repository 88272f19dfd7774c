//! MAC addresses as text.

/// Formats a MAC address, or bytes that should be one: `02:00:00:00:00:01`.
pub fn mac_text(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}
