//! How much memory an application holds, seen from outside its container.

use std::collections::BTreeMap;
use std::fs;

use nix::unistd::{Pid, SysconfVar, sysconf};

/// Resident memory in bytes of all processes below `root` but not `root` itself, as far as `/proc`
/// shows them (proc_pid_stat(5)).
pub fn below(root: Pid) -> u64 {
    let page = match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => u64::try_from(size).unwrap_or(4096),
        _ => 4096,
    };
    let mut children: BTreeMap<i32, Vec<(i32, u64)>> = BTreeMap::new();
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
        if let Some((parent, pages)) = parent_and_pages(&String::from_utf8_lossy(&stat)) {
            children.entry(parent).or_default().push((pid, pages));
        }
    }
    let mut sum: u64 = 0;
    let mut todo = vec![root.as_raw()];
    while let Some(pid) = todo.pop() {
        // Taken out, so that a number that was used again cannot make a circle.
        for (child, pages) in children.remove(&pid).unwrap_or_default() {
            sum = sum.saturating_add(pages.saturating_mul(page));
            todo.push(child);
        }
    }
    sum
}

/// Parent and resident pages from a line of `/proc/PID/stat`. The command in it, in parentheses, may
/// hold anything.
fn parent_and_pages(stat: &str) -> Option<(i32, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    // Field 3 is the first here; 4 is the parent, 24 the resident set.
    let parent = fields.nth(1)?.parse().ok()?;
    let pages = fields.nth(19)?.parse().ok()?;
    Some((parent, pages))
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
        let sum = below(nix::unistd::getpid());
        child.kill().unwrap();
        child.wait().unwrap();
        // Other tests may run children of their own; sleep alone has more than a page.
        assert!(sum > 4096, "{sum}");
        assert_eq!(0, below(Pid::from_raw(child.id() as i32)));
    }

    #[test]
    fn a_command_may_look_like_fields() {
        let line = "12 (a) b 3) S 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 5 8192 42 1844";
        assert_eq!(Some((7, 42)), parent_and_pages(line));
        assert_eq!(None, parent_and_pages("12 (x"));
    }
}
