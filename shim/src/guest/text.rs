//! Texts of the guest, as the host keeps and shows them.

/// Longest text of the guest that is kept, bytes.
pub(super) const TEXT_MAX: usize = 2048;

/// A text of the guest, truncated, with control characters replaced: a terminal would interpret them.
pub(super) fn sanitized(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_MAX)].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
