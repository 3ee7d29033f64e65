//! The course of downloads and uploads on stderr: a bar a file on a terminal, a line a file elsewhere.

use super::bytes;
use indicatif::{ProgressBar, ProgressStyle};
use peft_core::checkpoint::Progress;
use std::io::IsTerminal;

/// Shows one file after another.
pub struct Transfers {
    verb: &'static str,
    file: String,
    bar: Option<ProgressBar>,
}

impl Transfers {
    /// Files from the hub.
    pub fn downloading() -> Self {
        Self { verb: "downloading", file: String::new(), bar: None }
    }

    /// Files to the hub.
    pub fn uploading() -> Self {
        Self { verb: "uploading", ..Self::downloading() }
    }

    /// Takes note of some more bytes.
    pub fn show(&mut self, progress: &Progress) {
        if self.file != progress.file {
            self.file = progress.file.to_string();
            if std::io::stderr().is_terminal() {
                let bar = ProgressBar::new(progress.total.unwrap_or(0));
                if let Ok(style) =
                    ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}")
                {
                    bar.set_style(style);
                }
                bar.set_message(self.file.clone());
                self.bar = Some(bar);
            } else {
                let size = progress.total.map_or_else(String::new, |total| format!(" ({})", bytes(total)));
                eprintln!("{} {}{size}", self.verb, self.file);
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done);
        }
    }
}
