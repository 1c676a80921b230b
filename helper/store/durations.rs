//! How long each phase of a checkpoint took.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Making room in the store, and the new generation's directory.
pub const ROOM: &str = "room";
/// The engine's part: from the order until its files are in the generation, checked by its own rules.
pub const ENGINE: &str = "engine";
/// Learning from the engine's files what the application had open.
pub const OPEN_FILES: &str = "open-files";
/// Reading and hashing all files.
pub const HASH: &str = "hash";
/// Making them durable.
pub const SYNC: &str = "sync";

const ALL: [&str; 5] = [ROOM, ENGINE, OPEN_FILES, HASH, SYNC];

/// Milliseconds by phase. The manifest that holds them is written before the last steps of a commit;
/// the history has the time of the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Durations(BTreeMap<String, u64>);

impl Durations {
    pub fn note(&mut self, phase: &'static str, took: Duration) {
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.0.insert(phase.into(), millis);
    }

    /// In the order in which they happened; such as this program does not know come last.
    pub fn phases(&self) -> Vec<(&str, u64)> {
        let rank = |name: &str| ALL.iter().position(|known| *known == name);
        let mut phases: Vec<_> = self.0.iter().map(|(name, ms)| (&name[..], *ms)).collect();
        phases.sort_by_key(|(name, _)| rank(name).unwrap_or(ALL.len()));
        phases
    }

    pub fn sum(&self) -> Duration {
        let sum = self
            .0
            .values()
            .fold(0, |sum: u64, ms| sum.saturating_add(*ms));
        Duration::from_millis(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_as_they_happened_and_overflow_nothing() {
        let text = format!(
            r#"{{"sync":4,"later":{},"hash":3,"engine":2,"room":1}}"#,
            u64::MAX
        );
        let durations: Durations = serde_json::from_str(&text).unwrap();
        let names: Vec<_> = durations.phases().iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["room", "engine", "hash", "sync", "later"]);
        assert_eq!(durations.sum(), Duration::from_millis(u64::MAX));
    }
}
