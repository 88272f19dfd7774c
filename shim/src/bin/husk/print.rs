//! Output for people: text from a guest without terminal commands, tables, durations; and JSON.

use std::fmt::Display;
use std::fmt::Write as _;
use std::io;

use husk_shim::host::text::is_unsafe;
use serde::Serialize;
use serde_json::Value;

/// Text in one line that is safe on a terminal: control and format characters are replaced by caret notation or their
/// number, because an operator who reads a log needs to know of them. Tabs stay.
pub(crate) fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => out.push('\t'),
            '\0'..='\x1f' => out.extend(['^', char::from(c as u8 + b'@')]),
            '\x7f' => out.push_str("^?"),
            c if is_unsafe(c) => {
                // Writing to a String cannot fail.
                let _ = write!(out, "<U+{:04X}>", c as u32);
            }
            c => out.push(c),
        }
    }
    out
}

/// The same for text with several lines.
pub(crate) fn shown_lines(text: &str) -> String {
    text.lines().map(shown).collect::<Vec<_>>().join("\n")
}

/// A value that may be unknown, safe on a terminal; "-" if it is.
pub(crate) fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| shown(&value.to_string()))
}

/// A JSON value, safe on a terminal; "-" for null.
pub(crate) fn field(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => shown(text),
        other => shown(&other.to_string()),
    }
}

/// Rows with aligned columns. The first row holds the titles and sets the number of columns.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
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

/// A duration in one or two units.
pub(crate) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// Prints JSON, with the keys of its objects in alphabetical order.
pub(crate) fn json(out: &mut impl io::Write, value: &impl Serialize) -> io::Result<()> {
    writeln!(out, "{:#}", serde_json::to_value(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_guest_contains_no_terminal_commands() {
        let table = [
            ("plain äöü", "plain äöü"),
            ("\x1b[2J\x1b]0;title\x07", "^[[2J^[]0;title^G"),
            ("a\tb\r\n\0\x7f", "a\tb^M^J^@^?"),
            ("\u{9b}31m\u{202e}gnp.exe", "<U+009B>31m<U+202E>gnp.exe"),
        ];
        for (text, expected) in table {
            assert_eq!(shown(text), expected);
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
    fn durations_have_one_or_two_units() {
        let table = [
            (0, "0 ms"),
            (999, "999 ms"),
            (1000, "1.0 s"),
            (59_999, "59.9 s"),
            (61_000, "1m01s"),
            (3_600_000 * 5 + 60_000, "5h01m"),
            (86_400_000 * 400, "400d00h"),
        ];
        for (ms, expected) in table {
            assert_eq!(duration(ms), expected);
        }
    }
}
