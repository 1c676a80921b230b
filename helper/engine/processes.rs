//! The processes below one of ours, as `/proc` shows them.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process; the start time tells it from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    /// In clock ticks since boot.
    started: u64,
}

impl Process {
    /// Whether it is one of those that serve a container.
    pub fn serves(&self) -> bool {
        SERVANTS.contains(&self.name().as_str())
    }

    /// Its name; of one that has ended as well, until its parent has waited for it.
    pub fn name(&self) -> String {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        name.trim_end().to_owned()
    }

    /// Whether it has ended, and its parent has not waited for it yet.
    pub fn has_ended(&self) -> bool {
        has_ended(self.pid)
    }
}

/// Whether the process `pid` has ended, and its parent has not waited for it yet.
pub fn has_ended(pid: i32) -> bool {
    stat(pid).is_some_and(|process| process.state == "Z")
}

/// What is used of `/proc/PID/stat` (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: String,
    parent: i32,
    started: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    // The name may be no text.
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse(&String::from_utf8_lossy(&text))
}

fn parse(text: &str) -> Option<Stat> {
    // The name stands in parentheses and may hold anything, also more of them.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    Some(Stat {
        state: fields.next()?.to_owned(),
        parent: fields.next()?.parse().ok()?,
        started: fields.nth(17)?.parse().ok()?,
    })
}

/// `root` and all its descendants, parents before their children.
pub fn tree(root: Pid) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    let pids = fs::read_dir("/proc").into_iter().flatten();
    for pid in pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()) {
        if let Some(Stat {
            parent, started, ..
        }) = stat(pid)
        {
            children
                .entry(parent)
                .or_default()
                .push(Process { pid, started });
        }
    }
    let mut found: Vec<Process> = stat(root.as_raw())
        .map(|process| Process {
            pid: root.as_raw(),
            started: process.started,
        })
        .into_iter()
        .collect();
    let mut next = 0;
    while let Some(process) = found.get(next) {
        found.extend(children.remove(&process.pid).unwrap_or_default());
        next += 1;
    }
    found
}

/// All descendants of `root`, parents before their children.
pub fn below(root: Pid) -> Vec<Process> {
    let mut found = tree(root);
    found.retain(|process| process.pid != root.as_raw());
    found
}

/// Programs with which Apptainer serves a container's file systems, and cleans up after it.
const SERVANTS: &[&str] = &[
    "squashfuse",
    "squashfuse_ll",
    "fuse-overlayfs",
    "fuse2fs",
    "gocryptfs",
];

/// Kills those of `processes`, the tree of a container, that run in it, parents before their
/// children; not what started it and serves it.
pub fn kill_contents(processes: &[Process]) {
    let contents = processes.iter().skip(1);
    kill_each(contents.filter(|process| !process.serves()));
}

/// Kills those of `processes` that are still there, children before their parents.
pub fn kill_all(processes: &[Process]) {
    kill_each(processes.iter().rev());
}

fn kill_each<'a>(processes: impl Iterator<Item = &'a Process>) {
    for process in processes {
        if stat(process.pid).is_some_and(|now| now.started == process.started)
            && let Err(errno) = kill(Pid::from_raw(process.pid), Signal::SIGKILL)
            && errno != nix::errno::Errno::ESRCH
        {
            log::warn!("cannot end process {}: {errno}", process.pid);
        }
    }
}

/// Resident memory of `processes` in bytes. Pages that several share count for each: DMTCP writes
/// them for each.
///
/// The kernel counts per processor and does not sum up for `stat`: there the pages of a small process
/// may all be missing (kernel 6.2 on). `statm` is exact again since 6.17 (proc_pid_statm(5),
/// `get_mm_counter_sum` in fs/proc/task_mmu.c).
pub fn resident(processes: &[Process]) -> u64 {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|page| u64::try_from(page).ok())
        .unwrap_or(4096);
    processes
        .iter()
        .filter_map(|process| {
            let text = fs::read_to_string(format!("/proc/{}/statm", process.pid)).ok()?;
            let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
            Some(pages.saturating_mul(page))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_and_the_root_does_not() {
        let below = |root| resident(&below(root));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        // Other tests may run children of their own; sleep alone has more than a page, once its
        // libraries are there.
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while below(nix::unistd::getpid()) <= 4096 {
            assert!(std::time::Instant::now() < limit);
        }
        assert_eq!(0, below(Pid::from_raw(child.id() as i32)));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_command_may_look_like_fields() {
        let line = "12 (a) b 3) S 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 5 8192 42 1844";
        let stat = Stat {
            state: "S".to_owned(),
            parent: 7,
            started: 5,
        };
        assert_eq!(Some(stat), parse(line));
        assert_eq!(None, parse("12 (x"));
    }
}
