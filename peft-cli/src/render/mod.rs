//! What people see: errors, warnings, tables, progress.

mod comparison;
mod plan;
mod progress;
mod run;
mod tokens;
mod transfers;

pub use comparison::ComparisonProgress;
pub use plan::plan;
pub use progress::Progress;
pub use run::{run_plan, run_stopped, run_summary};
pub use tokens::tokens;
pub use transfers::Transfers;

use crate::error::CliError;
use crate::yaml::shell;
use std::io::IsTerminal;

/// Prints an error to stderr.
pub fn error(error: &CliError) {
    let label = if std::io::stderr().is_terminal() { "\x1b[1;31merror\x1b[0m" } else { "error" };
    eprintln!("{label}: {}", printable(&error.to_string()));
}

/// Prints a warning to stderr.
pub fn warning(message: &str) {
    let label = if std::io::stderr().is_terminal() { "\x1b[1;33mwarning\x1b[0m" } else { "warning" };
    eprintln!("{label}: {}", printable(message));
}

/// The text without what a terminal would obey: names in it come from files.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// A table with its columns aligned, first column to the left and the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(i, cell)| {
                let width = widths[i];
                if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            })
            .collect();
        out.push_str("  ");
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// How this program was called, for commands that can be pasted as they are.
pub fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "peft".to_string())
}

/// The command line of this process with `flag` set to `value`, to be pasted into a shell.
pub fn command_with(flag: &str, value: &str) -> String {
    with_flag(std::env::args(), flag, value)
}

fn with_flag(mut args: impl Iterator<Item = String>, flag: &str, value: &str) -> String {
    let mut words = Vec::new();
    while let Some(word) = args.next() {
        if word == flag {
            args.next();
        } else if !word.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')) {
            words.push(shell(&word));
        }
    }
    words.extend([flag.to_string(), shell(value)]);
    words.join(" ")
}

/// Bytes in the largest binary unit that keeps a digit before the point.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A count with a comma every three digits.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_to_go_on_can_be_pasted() {
        let with = |args: &[&str]| with_flag(args.iter().map(|word| word.to_string()), "--resume", "auto");
        assert_eq!(
            with(&[
                "peft",
                "train",
                "my recipe.yaml",
                "--resume",
                "out/x",
                "--override",
                "method={r: 1}",
                "a='b'"
            ]),
            r"peft train 'my recipe.yaml' --override 'method={r: 1}' 'a='\''b'\''' --resume auto"
        );
        assert_eq!(with(&["peft", "train", "r.yaml", "--resume=x"]), "peft train r.yaml --resume auto");
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(count(999), "999");
        assert_eq!(bytes(1536), "1.5 KiB");
    }
}
