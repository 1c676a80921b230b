//! history.jsonl: one line per event, append only.
//!
//! Contract: an event is one line, written in one piece and synced. A torn line (the node died) is
//! closed by the next writer and skipped by readers, as is a line of a newer version.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{At, Result, Time, Trigger, disk};
use crate::engine::{End, Kind};

pub const FILE_NAME: &str = "history.jsonl";

/// How much of the end of a history is read, in bytes: some 100,000 events.
const READ_MAX: u64 = 16 << 20;

/// Longest line that is written; reasons are cut to fit.
const TEXT_MAX: usize = 2048;

/// Something that happened to a computation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub time: Time,
    pub job: Option<u32>,
    pub run: u32,
    pub host: String,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// A run started the application from its beginning.
    Started {
        engine: Kind,
    },
    /// A run restarted the application from a generation; `took` in ms until it ran again.
    Restarted {
        engine: Kind,
        generation: u64,
        took: u64,
    },
    /// A restart did not come to run the application.
    RestartFailed {
        generation: u64,
        reason: String,
    },
    /// Something asked for a checkpoint.
    Triggered {
        trigger: Trigger,
    },
    /// A generation was committed; `took` in ms from [`Lock::begin`](super::Lock::begin) to the
    /// commit. Written by the store itself, as are the events from `MarkedBad` on.
    Checkpointed {
        trigger: Trigger,
        generation: u64,
        bytes: u64,
        took: u64,
    },
    /// A checkpoint failed; `lost`: the application did not survive it.
    CheckpointFailed {
        trigger: Trigger,
        reason: String,
        lost: bool,
    },
    /// A checkpoint was not tried, as it could not have worked.
    CheckpointRefused {
        trigger: Trigger,
        reason: String,
    },
    /// The job goes back into the queue.
    Requeued {
        reason: String,
    },
    /// The application was ended, or ended in a way that is not its completion.
    Ended {
        end: End,
    },
    /// The application ended by itself.
    Completed {
        end: End,
    },
    MarkedBad {
        generation: u64,
        reason: String,
    },
    /// A generation was deleted: `retention`, `space`, `delete` or `prune`.
    Deleted {
        generation: u64,
        reason: String,
    },
    /// A generation came from another name or from a file.
    Imported {
        generation: u64,
        from: String,
    },
    /// The lock was taken from a holder that was not proved dead.
    LockStolen {
        from: String,
    },
    Note {
        text: String,
    },
}

impl Event {
    fn shortened(&self) -> Event {
        let mut event = self.clone();
        let text = match &mut event.what {
            What::RestartFailed { reason, .. }
            | What::CheckpointFailed { reason, .. }
            | What::CheckpointRefused { reason, .. }
            | What::Requeued { reason }
            | What::MarkedBad { reason, .. }
            | What::Deleted { reason, .. }
            | What::Imported { from: reason, .. }
            | What::LockStolen { from: reason }
            | What::Note { text: reason } => reason,
            _ => return event,
        };
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        event
    }
}

/// Appends an event.
pub fn append(path: &Path, event: &Event) -> Result<()> {
    let encoded = serde_json::to_vec(&event.shortened()).map_err(io::Error::from);
    let mut line = encoded.at("write", path)?;
    line.push(b'\n');
    let mut write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        let mut last = [b'\n'];
        if file.metadata()?.len() > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        if last != [b'\n'] {
            line.insert(0, b'\n');
        }
        file.write_all(&line)?;
        file.sync_all()
    };
    write().at("append to", path)
}

/// What was read of a history.
#[derive(Debug, Default)]
pub struct History {
    /// Oldest first.
    pub events: Vec<Event>,
    /// Lines that could not be read.
    pub skipped: usize,
    /// Whether older events were left out.
    pub cut: bool,
}

pub fn read(path: &Path) -> Result<History> {
    let mut file = match disk::open_regular(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(History::default()),
        other => other.at("read", path)?,
    };
    let size = file.metadata().at("read", path)?.len();
    let cut = size > READ_MAX;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(size.saturating_sub(READ_MAX)))
        .and_then(|_| file.take(READ_MAX).read_to_end(&mut bytes))
        .at("read", path)?;
    let mut history = History {
        cut,
        ..History::default()
    };
    let mut lines = bytes.split(|b| *b == b'\n');
    if cut {
        lines.next();
    }
    for line in lines.filter(|line| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(event) => history.events.push(event),
            Err(_) => history.skipped += 1,
        }
    }
    Ok(history)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Event {
        Event {
            time: Time::from_millis(1),
            job: Some(7),
            run: 0,
            host: "n1".into(),
            what: What::Note { text: text.into() },
        }
    }

    #[test]
    fn a_torn_line_costs_that_line_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        append(&path, &event("one")).unwrap();
        append(&path, &event("two")).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            append(&path, &event("three")).unwrap();
            let history = read(&path).unwrap();
            assert!(history.skipped <= 1);
            assert_eq!(history.events.last(), Some(&event("three")), "cut at {cut}");
            let first_whole = cut >= whole.len() / 2 - 1;
            assert_eq!(history.events.len() >= 2, first_whole, "cut at {cut}");
        }
    }

    #[test]
    fn unknown_events_are_skipped_and_long_texts_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, "{\"event\":\"danced\"}\n\n[]\n").unwrap();
        append(&path, &event(&"ä".repeat(1 << 20))).unwrap();
        let history = read(&path).unwrap();
        assert_eq!((history.events.len(), history.skipped), (1, 2));
        assert!(std::fs::metadata(&path).unwrap().len() < 3000);
    }
}
