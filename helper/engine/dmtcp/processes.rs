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

/// Parent and start time of a process (proc_pid_stat(5)).
fn stat(pid: i32) -> Option<(i32, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything, also more of them.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    Some((parent, started))
}

/// `root` and all its descendants, parents before their children.
pub fn tree(root: Pid) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    let pids = fs::read_dir("/proc").into_iter().flatten();
    for pid in pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()) {
        if let Some((parent, started)) = stat(pid) {
            children
                .entry(parent)
                .or_default()
                .push(Process { pid, started });
        }
    }
    let mut found: Vec<Process> = stat(root.as_raw())
        .map(|(_, started)| Process {
            pid: root.as_raw(),
            started,
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
    let serves = |process: &&Process| {
        let name = fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        SERVANTS.contains(&name.trim_end())
    };
    let contents = processes.iter().skip(1).filter(|process| !serves(process));
    kill_each(contents);
}

/// Kills those of `processes` that are still there, children before their parents.
pub fn kill_all(processes: &[Process]) {
    kill_each(processes.iter().rev());
}

fn kill_each<'a>(processes: impl Iterator<Item = &'a Process>) {
    for process in processes {
        if stat(process.pid).is_some_and(|(_, started)| started == process.started)
            && let Err(errno) = kill(Pid::from_raw(process.pid), Signal::SIGKILL)
            && errno != nix::errno::Errno::ESRCH
        {
            log::warn!("cannot end process {}: {errno}", process.pid);
        }
    }
}

/// Resident memory of `processes` in bytes. Pages that several share count for each: DMTCP writes
/// them for each.
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
