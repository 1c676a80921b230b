//! A process in a cluster, read from its /proc.

use std::fs;
use std::path::Path;

/// A process in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As the login host counts.
    pub pid: i32,
    pub parent: i32,
    pub uid: u32,
    pub comm: String,
    /// The command line, joined with spaces; empty for a zombie.
    pub args: String,
}

impl std::fmt::Display for Process {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let args: String = self.args.chars().take(160).collect();
        write!(
            out,
            "{} (child of {}, uid {}) {}: {args}",
            self.pid, self.parent, self.uid, self.comm
        )
    }
}

impl Process {
    /// Whether this belongs to a cluster at rest.
    pub fn is_daemon(&self) -> bool {
        const DAEMONS: [&str; 7] = [
            "unshare",
            "slurmctld",
            "slurmscriptd",
            "slurmd",
            "cat",
            "sh",
            "nsenter",
        ];
        // From 23.11 on slurmd may keep a slurmstepd of its own, which is no step's.
        let own = DAEMONS.contains(&self.comm.as_str()) || self.args.ends_with("stepd infinity");
        self.comm == "munged" || self.uid == 0 && own
    }

    pub fn read(directory: &Path) -> Option<Process> {
        let pid = directory.file_name()?.to_str()?.parse().ok()?;
        let status = fs::read_to_string(directory.join("status")).ok()?;
        let field = |key: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            line.split_whitespace().next()
        };
        let args = fs::read(directory.join("cmdline")).ok()?;
        let args = String::from_utf8_lossy(&args).replace('\0', " ");
        Some(Process {
            pid,
            parent: field("PPid")?.parse().ok()?,
            uid: field("Uid")?.parse().ok()?,
            comm: field("Name").unwrap_or_default().to_owned(),
            args: args.trim_end().to_owned(),
        })
    }
}
