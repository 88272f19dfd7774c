//! How things are shown: nothing of a guest's words is a command to the terminal, tables have columns, times are read by people.

use std::fmt::Write as _;

use serde_json::Value;

/// Text as it may be shown on a terminal, in one line: control characters in caret notation or by number, and so those that turn the direction
/// of writing. Tabs stay.
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push('\t'),
            '\0'..='\x1f' => out.extend(['^', char::from(c as u8 + b'@')]),
            '\x7f' => out.push_str("^?"),
            '\u{80}'..='\u{9f}'
            | '\u{61c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => {
                // Writing to a String cannot fail.
                let _ = write!(out, "<U+{:04X}>", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

/// The same for text of several lines.
pub fn shown_lines(text: &str) -> String {
    text.lines().map(shown).collect::<Vec<_>>().join("\n")
}

/// A string of a JSON object as it may be shown; "-" for what is not known.
pub fn field(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => shown(text),
        other => shown(&other.to_string()),
    }
}

/// Rows in columns, the last one as wide as it is. The first row is the titles'.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// How long something took or has been, in one or two units.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_no_commands_to_the_terminal() {
        let table = [
            ("plain äöü", "plain äöü"),
            ("\x1b[2J\x1b]0;title\x07", "^[[2J^[]0;title^G"),
            ("a\tb\r\n\0\x7f", "a\tb^M^J^@^?"),
            ("\u{9b}31m\u{202e}gnp.exe", "<U+009B>31m<U+202E>gnp.exe"),
        ];
        for (text, wanted) in table {
            assert_eq!(shown(text), wanted);
        }
        assert_eq!(shown_lines("a\x1b\nb\n"), "a^[\nb");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["A", "BB", "C"], ["ääää", "b", "c"], ["a", "", ""]];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(str::to_owned).to_vec()).collect();
        assert_eq!(table(&rows), "A     BB  C\nääää  b   c\na\n");
    }

    #[test]
    fn durations_are_read_by_people() {
        let table = [
            (0, "0 ms"),
            (999, "999 ms"),
            (1000, "1.0 s"),
            (59_999, "59.9 s"),
            (61_000, "1m01s"),
            (3_600_000 * 5 + 60_000, "5h01m"),
            (86_400_000 * 400, "400d00h"),
        ];
        for (ms, wanted) in table {
            assert_eq!(duration(ms), wanted);
        }
    }
}
