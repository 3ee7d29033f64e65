//! SIGINT and SIGTERM ask a run to save its state and end; a second one ends it at once.

use crate::error::CliError;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Whether, and by which signal, the process was asked to stop.
pub struct StopSignal {
    requested: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl StopSignal {
    /// Listens from now on. The first signal is acknowledged on stderr when it comes.
    pub fn listen() -> Result<Self, CliError> {
        let stop = Self { requested: Arc::default(), signal: Arc::default() };
        stop.register().map_err(|source| CliError::Io { path: PathBuf::from("signal handler"), source })?;
        Ok(stop)
    }

    fn register(&self) -> std::io::Result<()> {
        let (mut read, write) = UnixStream::pair()?;
        for signal in [SIGINT, SIGTERM] {
            // In this order: the second signal finds the flag that the first one has set.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&self.requested))?;
            flag::register_usize(signal, Arc::clone(&self.signal), signal as usize)?;
            flag::register(signal, Arc::clone(&self.requested))?;
            low_level::pipe::register(signal, write.try_clone()?)?;
        }
        // A handler may not print, so a thread that waits for it does.
        std::thread::spawn(move || {
            if read.read_exact(&mut [0]).is_ok() {
                eprintln!(
                    "stopping after the micro-batch in progress; a second signal ends at once, unsaved"
                );
            }
        });
        Ok(())
    }

    /// True once a signal has come.
    pub fn requested(&self) -> &AtomicBool {
        &self.requested
    }

    /// The name of the signal that came.
    pub fn name(&self) -> &'static str {
        low_level::signal_name(self.number()).unwrap_or("a signal")
    }

    /// The exit code that a shell gives to a process ended by the signal.
    pub fn exit_code(&self) -> u8 {
        128u8.saturating_add(self.number() as u8)
    }

    fn number(&self) -> i32 {
        self.signal.load(Ordering::SeqCst) as i32
    }
}
