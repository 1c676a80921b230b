//! What the helper says to people: lines on the job's own standard error.
//!
//! Contract: after [`init`], `log::error!`, `warn!` and `info!` each write whole lines, one write(2)
//! per message, prefixed `container-checkpoint:`; `debug!` and `trace!` only where asked for.
//! Standard output is the application's alone.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::words;

struct Stderr;

/// Where lines go instead of standard error.
static TARGET: OnceLock<File> = OnceLock::new();

/// Has lines go to `file` from now on. Only the first one counts.
pub fn redirect(file: File) {
    let _ = TARGET.set(file);
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // Libraries have nothing to say to users.
        metadata.target().starts_with("container_checkpoint")
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            let lines = lines(record.level(), &record.args().to_string());
            // Nobody is left to be told of a standard error that is gone.
            let _ = match TARGET.get() {
                Some(mut file) => file.write_all(lines.as_bytes()),
                None => std::io::stderr().lock().write_all(lines.as_bytes()),
            };
        }
    }

    fn flush(&self) {}
}

/// The prefixed lines of one message.
fn lines(level: Level, message: &str) -> String {
    let kind = match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug | Level::Trace => "debug: ",
    };
    let mut out = String::new();
    for (number, line) in message.lines().enumerate() {
        let kind = if number == 0 { kind } else { "  " };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "container-checkpoint: {kind}{line}");
    }
    out
}

/// The most detailed level that is shown: `info`, or what `CONTAINER_CHECKPOINT_LOG` says.
fn level(variable: Option<&str>) -> Result<LevelFilter, String> {
    match variable {
        None | Some("") => Ok(LevelFilter::Info),
        Some(text) => text.parse().map_err(|_| {
            format!(
                "{}=`{text}` is none of off, error, warn, info, debug, trace; taking info",
                words::variable::LOG
            )
        }),
    }
}

/// Starts logging; called once, first thing in main.
pub fn init() {
    let text = std::env::var(words::variable::LOG).ok();
    let level = level(text.as_deref());
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(*level.as_ref().unwrap_or(&LevelFilter::Info));
    }
    if let Err(message) = level {
        log::warn!("{message}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_prefixed() {
        assert_eq!(lines(Level::Info, "saved"), "container-checkpoint: saved\n");
        assert_eq!(
            lines(Level::Error, "no room\nfree some"),
            "container-checkpoint: error: no room\ncontainer-checkpoint:   free some\n"
        );
    }

    #[test]
    fn levels() {
        assert_eq!(level(None), Ok(LevelFilter::Info));
        assert_eq!(level(Some("")), Ok(LevelFilter::Info));
        assert_eq!(level(Some("debug")), Ok(LevelFilter::Debug));
        assert!(level(Some("loud")).is_err());
    }
}
