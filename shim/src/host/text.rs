//! Text that others have written: a guest, or a helper process that works for one. All such text passes through
//! [`clean`] before it is logged, stored, returned to containerd or shown. Pure.

/// Longest text that is kept, in characters.
pub const LONGEST: usize = 1000;

/// Format characters (category Cf of Unicode 16) and the two line ends of category Zl and Zp, as ranges. They are
/// invisible, reorder what surrounds them, or end lines.
const FORMAT: [(char, char); 20] = [
    ('\u{ad}', '\u{ad}'),
    ('\u{600}', '\u{605}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{6dd}', '\u{6dd}'),
    ('\u{70f}', '\u{70f}'),
    ('\u{890}', '\u{891}'),
    ('\u{8e2}', '\u{8e2}'),
    ('\u{180e}', '\u{180e}'),
    ('\u{200b}', '\u{200f}'),
    ('\u{2028}', '\u{202e}'),
    ('\u{2060}', '\u{206f}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{fff9}', '\u{fffb}'),
    ('\u{110bd}', '\u{110bd}'),
    ('\u{110cd}', '\u{110cd}'),
    ('\u{13430}', '\u{1343f}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0001}', '\u{e0001}'),
    ('\u{e0020}', '\u{e007f}'),
];

/// Whether a character may command a terminal, end a line, be invisible or change the direction of writing.
pub fn is_unsafe(c: char) -> bool {
    c.is_control() || (c >= FORMAT[0].0 && FORMAT.iter().any(|(first, last)| (*first..=*last).contains(&c)))
}

/// The text in one line of at most [`LONGEST`] characters, without unsafe ones. Line ends and tabs become spaces, so
/// that words stay apart.
pub fn clean(text: &str) -> String {
    let kept = |c: char| match c {
        '\n' | '\r' | '\t' | '\u{85}' | '\u{2028}' | '\u{2029}' => Some(' '),
        c if is_unsafe(c) => None,
        c => Some(c),
    };
    let mut kept = text.chars().filter_map(kept);
    let mut cleaned: String = kept.by_ref().take(LONGEST).collect();
    if kept.next().is_some() {
        cleaned.pop();
        cleaned.push('…');
    }
    cleaned
}

/// The last lines of a text that are not empty, each cleaned: at most `most`, and at most [`LONGEST`] characters
/// together.
pub fn last_lines(text: &str, most: usize) -> String {
    let mut room = LONGEST;
    let mut lines = Vec::new();
    for line in text.lines().rev().map(|line| clean(line.trim_end())).filter(|line| !line.is_empty()).take(most) {
        match room.checked_sub(line.chars().count() + 1) {
            Some(rest) => room = rest,
            // A single line may take all of it.
            None if !lines.is_empty() => break,
            None => room = 0,
        }
        lines.push(line);
    }
    lines.reverse();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_one_short_line_without_commands_for_terminals_or_invisible_characters() {
        let table = [
            ("plain äöü 漢字 🦀", "plain äöü 漢字 🦀"),
            ("a\nlevel=error msg=forged\r\n\tb", "a level=error msg=forged   b"),
            ("\x1b[2J\x1b]0;title\x07\0\x7f\u{9b}31m", "[2J]0;title31m"),
            ("\u{202e}gpj.exe\u{2066}\u{200b}\u{feff}\u{ad}\u{e0041}", "gpj.exe"),
            ("one\u{2028}two\u{2029}three\u{85}four", "one two three four"),
            ("", ""),
        ];
        for (text, expected) in table {
            assert_eq!(clean(text), expected);
            assert_eq!(clean(&clean(text)), expected, "cleaned twice");
        }
        let exact = "é".repeat(LONGEST);
        assert_eq!(clean(&exact), exact);
        let cut = clean(&"é".repeat(4_000_000));
        assert!(cut.chars().count() == LONGEST && cut.ends_with("é…"));
        assert_eq!(clean(&format!("{exact}\u{202e}\x1b")), exact, "nothing that is kept was cut");
    }

    #[test]
    fn the_last_lines_are_short_together() {
        let table = [
            ("one\r\ntwo\r\nthree\r\n", 2, "two\nthree"),
            ("\x1b[31mred\x1b[0m\x07\n\n\n", 5, "[31mred[0m"),
            ("", 5, ""),
        ];
        for (text, most, expected) in table {
            assert_eq!(last_lines(text, most), expected);
        }
        let many = "0123456789\n".repeat(1000);
        assert_eq!(last_lines(&many, usize::MAX).lines().count(), LONGEST / 11);
        let long = format!("first\n{}", "x".repeat(5 * LONGEST));
        assert_eq!(last_lines(&long, 2).chars().count(), LONGEST);
    }
}
