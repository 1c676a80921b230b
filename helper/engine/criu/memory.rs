//! How much memory an application holds, seen from outside its container.

use std::collections::BTreeMap;
use std::fs;

use nix::unistd::{Pid, SysconfVar, sysconf};

/// Resident memory in bytes of all processes below `root` but not `root` itself, as far as `/proc`
/// shows them. The kernel counts per processor and does not sum up for `stat`: there the pages of a
/// small process may all be missing (kernel 6.2 on). `statm` is exact again since 6.17
/// (proc_pid_statm(5), `get_mm_counter_sum` in fs/proc/task_mmu.c).
pub fn below(root: Pid) -> u64 {
    let page = match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => u64::try_from(size).unwrap_or(4096),
        _ => 4096,
    };
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // A process may be gone by now.
        let Ok(stat) = fs::read(entry.path().join("stat")) else {
            continue;
        };
        if let Some(parent) = parent(&String::from_utf8_lossy(&stat)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut sum: u64 = 0;
    let mut todo = vec![root.as_raw()];
    while let Some(pid) = todo.pop() {
        // Taken out, so that a number that was used again cannot make a circle.
        for child in children.remove(&pid).unwrap_or_default() {
            sum = sum.saturating_add(resident_pages(child).saturating_mul(page));
            todo.push(child);
        }
    }
    sum
}

/// The parent from a line of `/proc/PID/stat`. The command in it, in parentheses, may hold anything.
fn parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(") ")?;
    // Field 3 is the first here; 4 is the parent.
    rest.split(' ').nth(1)?.parse().ok()
}

/// Of one process; 0 if it is gone.
fn resident_pages(pid: i32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let resident = statm.split(' ').nth(1);
    resident.and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_and_the_root_does_not() {
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
        assert_eq!(Some(7), parent(line));
        assert_eq!(None, parent("12 (x"));
    }
}
