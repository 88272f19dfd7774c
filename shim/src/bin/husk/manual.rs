//! `husk manual`: manual pages in the format of man(7). The page of `husk` comes from the definition of its arguments,
//! that of the configuration from the commented file `setup/config.toml`, so neither can fall behind.

use std::fmt::Write;

use clap::{Arg, Command, ValueEnum};

const CONFIG: &str = include_str!("../../../../setup/config.toml");

/// The pages.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Page {
    /// husk(8)
    Husk,
    /// containerd-shim-husk-v1(8)
    #[value(name = "containerd-shim-husk-v1")]
    Shim,
    /// husk-config(5)
    #[value(name = "husk-config")]
    Config,
}

/// The page's text.
pub(crate) fn page(page: Page, command: &mut Command) -> String {
    match page {
        Page::Husk => of_husk(command),
        Page::Shim => of_shim(),
        Page::Config => of_config(),
    }
}

fn header(name: &str, section: u8, about: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let title = name.to_uppercase();
    format!(".TH {title} {section} \"\" \"husk {version}\"\n.SH NAME\n{} \\- {}\n", escape(name), escape(about))
}

/// Text in which nothing is a request or an escape sequence.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let protect = |line: &str| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() };
    text.lines().map(protect).collect::<Vec<_>>().join("\n")
}

fn paragraphs(out: &mut String, text: &str) {
    for paragraph in text.split("\n\n") {
        push(out, &format!(".PP\n{}\n", escape(paragraph)));
    }
}

fn push(out: &mut String, text: &str) {
    out.push_str(text);
}

fn of_husk(command: &mut Command) -> String {
    command.build();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut out = header("husk", 8, &lower_first(&about));
    push(&mut out, ".SH SYNOPSIS\n.B husk\n.I COMMAND\n[\\fIOPTIONS\\fR] [\\fIARGUMENTS\\fR]\n.SH DESCRIPTION\n");
    paragraphs(&mut out, &command.get_long_about().map(ToString::to_string).unwrap_or_default());
    push(&mut out, ".SH COMMANDS\n");
    subcommands(&mut out, command);
    after_help(&mut out, &command.get_after_help().map(ToString::to_string).unwrap_or_default());
    push(&mut out, ".SH SEE ALSO\n.BR husk\\-config (5),\n.BR containerd\\-shim\\-husk\\-v1 (8)\n");
    out
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

/// The commands, those of groups in the place of their group.
fn subcommands(out: &mut String, command: &Command) {
    for command in command.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help") {
        if command.has_subcommands() {
            subcommands(out, command);
            continue;
        }
        let usage = command.clone().render_usage().to_string();
        push(out, &format!(".SS {}\n", escape(usage.trim_start_matches("Usage: "))));
        let about = command.get_long_about().or(command.get_about());
        paragraphs(out, &about.map(ToString::to_string).unwrap_or_default());
        let own =
            |argument: &&Arg| !argument.is_hide_set() && !matches!(argument.get_id().as_str(), "help" | "version");
        for argument in command.get_arguments().filter(own) {
            describe(out, argument);
        }
    }
}

fn describe(out: &mut String, argument: &Arg) {
    let short = argument.get_short().map(|short| format!("-{short}, ")).unwrap_or_default();
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    push(out, &format!(".TP\n\\fB{}\\fR\n{}\n", escape(&format!("{short}{argument}")), escape(&help)));
    if !argument.get_action().takes_values() {
        return;
    }
    let values: Vec<String> = argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if !values.is_empty() {
        push(out, &format!("Possible values: {}.\n", escape(&values.join(", "))));
    }
    let defaults: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if !defaults.is_empty() {
        push(out, &format!("Default: {}.\n", escape(&defaults.join(" "))));
    }
}

/// `Title: text`, or `Title:` and lines `  name  text`, separated by empty lines.
fn after_help(out: &mut String, text: &str) {
    for part in text.split("\n\n") {
        let (title, rest) = part.split_once(':').unwrap_or(("Notes", part));
        push(out, &format!(".SH {}\n", title.to_uppercase()));
        for line in rest.trim_start_matches('\n').lines() {
            match line.strip_prefix("  ").and_then(|item| item.split_once(' ')) {
                Some((name, text)) => push(out, &format!(".TP\n.B {}\n{}\n", escape(name), escape(text.trim()))),
                None => push(out, &format!("{}\n", escape(line.trim()))),
            }
        }
    }
}

fn of_shim() -> String {
    let mut out = header("containerd-shim-husk-v1", 8, "containerd shim that runs containers in virtual machines");
    push(
        &mut out,
        ".SH SYNOPSIS\n.B containerd\\-shim\\-husk\\-v1\n.RB [ \\-v ]\n.RB [ \\-info ]\n\
         [\\fIFLAGS\\fR] [\\fBstart\\fR|\\fBdelete\\fR]\n\
         .SH DESCRIPTION\ncontainerd runs this program for the runtime\n.BR io.containerd.husk.v1 .\n\
         It boots a virtual machine for each pod, or for each container outside of pods, and relays containerd's calls \
         to the machine. It is not meant to be run by hand: use\n.BR husk (8)\nto inspect its machines.\n\
         .SH OPTIONS\n.TP\n.B \\-v\nPrints the version.\n\
         .TP\n.B \\-info\nPrints what the runtime supports, as a protobuf message. It reads options from stdin.\n\
         .PP\nThe other flags are those that containerd passes to every shim.\n\
         .SH FILES\n.TP\n.I /etc/husk/config.toml\nThe configuration, see\n.BR husk\\-config (5).\n\
         .TP\n.I /run/husk\nThe state of the sandboxes.\n\
         .SH SEE ALSO\n.BR husk (8),\n.BR husk\\-config (5)\n",
    );
    out
}

/// The commented file: an introduction, then sections `# --- title ---`, in which a comment precedes its key.
fn of_config() -> String {
    let mut out = header("husk-config", 5, "configuration of husk's virtual machines");
    push(&mut out, ".SH SYNOPSIS\n.I /etc/husk/config.toml\n.SH DESCRIPTION\n");
    let mut comment: Vec<&str> = Vec::new();
    for line in CONFIG.lines() {
        if let Some(title) = line.strip_prefix("# --- ").and_then(|rest| rest.strip_suffix(" ---")) {
            push(&mut out, &format!(".SH {}\n", escape(&title.to_uppercase())));
        } else if let Some(text) = line.strip_prefix("# ").or((line == "#").then_some("")) {
            comment.push(text);
        } else if let Some(key) = line.strip_prefix('#') {
            let (setting, kind) = match key.split_once(" # example") {
                Some((setting, _)) => (setting, "Example"),
                None => (key, "Default"),
            };
            let name = setting.split(' ').next().unwrap_or_default();
            let text = escape(&comment.join("\n"));
            // Writing to a String cannot fail.
            let _ = write!(out, ".TP\n.B {}\n{text}\n.br\n{kind}: {}\n", escape(name), escape(setting));
            comment.clear();
        } else if !comment.is_empty() {
            // The second paragraph of the introduction describes the commented file.
            push(
                &mut out,
                &format!("{}\n", escape(&comment.split(|line| line.is_empty()).next().unwrap_or_default().join("\n"))),
            );
            push(&mut out, ".PP\n.B husk check\\-config\nvalidates the file and reports every problem.\n");
            comment.clear();
        }
    }
    push(&mut out, ".SH SEE ALSO\n.BR husk (8)\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_a_request() {
        assert_eq!(escape(".TH\n'br a-b \\fB"), "\\&.TH\n\\&'br a\\-b \\efB");
    }

    #[test]
    fn the_page_of_the_configuration_has_every_key_and_section() {
        let page = of_config();
        for line in CONFIG.lines() {
            if let Some(key) = line.strip_prefix('#').filter(|key| key.starts_with(|c: char| c.is_ascii_lowercase())) {
                let name = key.split(' ').next().unwrap();
                assert!(page.contains(&format!("\n.B {name}\n")), "{name}");
            }
        }
        assert!(page.contains("\n.SH SIZE OF A VM\n") && page.contains("Default: hugepages = false\n"), "{page}");
        assert!(
            page.contains("Example: vcpus = 2\n") && page.contains(".SH DESCRIPTION\nConfiguration of husk"),
            "{page}"
        );
    }
}
