//! Splits output into lines of text. Pure.

/// Longest line, bytes. Longer lines are split.
const LONGEST: usize = 8 * 1024;

/// Splits bytes into lines and buffers an incomplete line.
#[derive(Debug, Default)]
pub struct Lines {
    incomplete: Vec<u8>,
}

impl Lines {
    /// Adds `bytes` and returns the lines that are now complete, without their ends. Invalid UTF-8 is replaced; other
    /// control characters are kept.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            for chunk in piece.chunks(LONGEST) {
                self.incomplete.extend_from_slice(chunk);
                if chunk.ends_with(b"\n") || self.incomplete.len() >= LONGEST {
                    lines.extend(self.end());
                }
            }
        }
        lines
    }

    /// Returns the incomplete last line.
    pub fn end(&mut self) -> Option<String> {
        if self.incomplete.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(&self.incomplete);
        let line = text.strip_suffix('\n').unwrap_or(&text).trim_end_matches('\r').to_owned();
        self.incomplete.clear();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_do_not_depend_on_the_sizes_of_the_reads() {
        let text = "one\r\n\ntwo ä\x1b[31m\n\rthree\nrest";
        let expected = ["one", "", "two ä\x1b[31m", "\rthree", "rest"];
        for size in [1, 2, 3, 5, 100] {
            let mut lines = Lines::default();
            let mut all: Vec<String> = text.as_bytes().chunks(size).flat_map(|bytes| lines.take(bytes)).collect();
            all.extend(lines.end());
            assert_eq!(all, expected, "{size}");
            assert_eq!(lines.end(), None);
        }
    }

    #[test]
    fn an_endless_line_is_split() {
        let mut lines = Lines::default();
        let split = lines.take(&vec![b'x'; 3 * LONGEST + 1]);
        assert_eq!(split.iter().map(String::len).collect::<Vec<_>>(), [LONGEST; 3]);
        assert_eq!(lines.take(b"\xff\n"), ["x\u{fffd}"]);
    }
}
