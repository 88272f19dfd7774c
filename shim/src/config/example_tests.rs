//! The commented configuration that `./task install` installs: it lists every key, with the default that the code has.

use std::path::Path;

use super::keys::KEYS;
use super::load::parse;
use super::settings::Config;

const EXAMPLE: &str = include_str!("../../../setup/config.toml");
/// Ends the line of a key without a default.
const NO_DEFAULT: &str = " # example";

/// The commented assignments: `#key = value`, without a space after the number sign.
fn assignments() -> Vec<&'static str> {
    let lines = EXAMPLE.lines().filter_map(|line| line.strip_prefix('#'));
    lines.filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase())).collect()
}

fn parsed(text: &str) -> Config {
    parse(text, Path::new("setup/config.toml")).unwrap()
}

#[test]
fn the_example_configuration_changes_nothing_until_a_line_is_uncommented() {
    assert_eq!(parsed(EXAMPLE), Config::default());
}

#[test]
fn the_example_configuration_lists_every_key_once() {
    let mut listed: Vec<&str> = assignments().iter().filter_map(|line| Some(line.split_once(" = ")?.0)).collect();
    let mut expected = KEYS.map(|key| key.name);
    listed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(listed, expected);
}

#[test]
fn the_example_configuration_shows_the_defaults() {
    let (examples, defaults): (Vec<&str>, Vec<&str>) =
        assignments().into_iter().partition(|line| line.ends_with(NO_DEFAULT));
    for line in defaults {
        assert_eq!(parsed(line), Config::default(), "{line}");
    }
    // A value that differs from no value shows that there is no default.
    for line in examples {
        assert_ne!(parsed(line), Config::default(), "{line}");
    }
}

#[test]
fn the_example_configuration_is_valid_when_uncommented() {
    // image_dir replaces kernel and initrd, so it cannot stand beside them.
    let (folder, others): (Vec<&str>, Vec<&str>) =
        assignments().into_iter().partition(|line| line.starts_with("image_dir"));
    parsed(&folder.join("\n"));
    parsed(&others.join("\n"));
}
