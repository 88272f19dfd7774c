//! Bytes of a record as lines of text. Pure.

/// Longest line, in bytes; what is longer becomes several.
const LONGEST: usize = 8 * 1024;

/// Cuts what comes into lines, and keeps a part of one until the rest comes.
#[derive(Debug, Default)]
pub struct Lines {
    part: Vec<u8>,
}

impl Lines {
    /// The lines that are complete with these bytes. What is no UTF-8 is replaced; control characters stay, but for a line's end.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            for chunk in piece.chunks(LONGEST) {
                self.part.extend_from_slice(chunk);
                if chunk.ends_with(b"\n") || self.part.len() >= LONGEST {
                    lines.extend(self.end());
                }
            }
        }
        lines
    }

    /// The last line, if it has no end.
    pub fn end(&mut self) -> Option<String> {
        if self.part.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(&self.part);
        let line = text.strip_suffix('\n').unwrap_or(&text).trim_end_matches('\r').to_owned();
        self.part.clear();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_their_bytes_come() {
        let text = "one\r\n\ntwo ä\x1b[31m\n\rthree\nrest";
        let wanted = ["one", "", "two ä\x1b[31m", "\rthree", "rest"];
        for size in [1, 2, 3, 5, 100] {
            let mut lines = Lines::default();
            let mut all: Vec<String> = text.as_bytes().chunks(size).flat_map(|bytes| lines.take(bytes)).collect();
            all.extend(lines.end());
            assert_eq!(all, wanted, "{size}");
            assert_eq!(lines.end(), None);
        }
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut lines = Lines::default();
        let cut = lines.take(&vec![b'x'; 3 * LONGEST + 1]);
        assert_eq!(cut.iter().map(String::len).collect::<Vec<_>>(), [LONGEST; 3]);
        assert_eq!(lines.take(b"\xff\n"), ["x\u{fffd}"]);
    }
}
