//! The templates of containerd's mount manager (docs/mounts.md in containerd's repository): `{{ mount 0 }}` and the like.
//! They are text/template actions of Go with four functions. husk supports calls of these with numbers.

/// A call in a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// The source of a mount.
    Source(usize),
    /// Where a mount is mounted.
    Mount(usize),
    /// Where several mounts are mounted, from the first to the last, separated by colons.
    Overlay(usize, usize),
}

/// Replaces every call in a text by its value.
///
/// # Errors
/// What is not supported, or the error of `value`.
pub(super) fn expand(text: &str, value: &dyn Fn(Call) -> Result<String, String>) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, action)) = rest.split_once("{{") {
        let (action, after) = action.split_once("}}").ok_or("a template is not closed")?;
        expanded.push_str(before);
        expanded.push_str(&value(parse(action)?)?);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn parse(action: &str) -> Result<Call, String> {
    let words: Vec<&str> = action.split_ascii_whitespace().collect();
    let unsupported = || format!("husk does not support the template {{{{{action}}}}}");
    let number = |word: &str| word.parse::<usize>().map_err(|_| unsupported());
    match words[..] {
        ["source", index] => Ok(Call::Source(number(index)?)),
        ["mount", index] => Ok(Call::Mount(number(index)?)),
        ["overlay", first, last] => Ok(Call::Overlay(number(first)?, number(last)?)),
        _ => Err(unsupported()),
    }
}

/// The mounts of an overlay, the uppermost layer first.
pub(super) fn range(first: usize, last: usize) -> Vec<usize> {
    if first <= last { (first..=last).collect() } else { (last..=first).rev().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_replaced_and_other_templates_rejected() {
        let value = |call| match call {
            Call::Mount(9) => Err("no mount 9".to_owned()),
            call => Ok(format!("<{call:?}>")),
        };
        let expand = |text| expand(text, &value);
        for (text, expected) in [
            ("plain", Ok("plain")),
            ("a{{ mount 0 }}/b{{mount 12}}", Ok("a<Mount(0)>/b<Mount(12)>")),
            ("lowerdir={{ overlay 3 1 }}", Ok("lowerdir=<Overlay(3, 1)>")),
            ("{{source 0}}", Ok("<Source(0)>")),
            ("{{ mount 9 }}", Err("no mount 9")),
            ("{{ mount 0", Err("a template is not closed")),
            ("{{ target 0 }}", Err("husk does not support the template {{ target 0 }}")),
            ("{{ mount -1 }}", Err("husk does not support the template {{ mount -1 }}")),
            ("{{ if true }}", Err("husk does not support the template {{ if true }}")),
        ] {
            assert_eq!(expand(text), expected.map(str::to_owned).map_err(str::to_owned), "{text}");
        }
        assert_eq!((range(1, 3), range(3, 1), range(2, 2)), (vec![1, 2, 3], vec![3, 2, 1], vec![2]));
    }
}
