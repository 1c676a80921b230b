//! What the application has computed: how long it ran, and its CPU time.
//!
//! Contract: seen from outside in /proc, on this node. What checkpoints cost is left out of the CPU
//! time: [`Work::pause`] before one, [`Work::go_on`] after it.

use std::time::{Duration, Instant};

use nix::unistd::{SysconfVar, sysconf};

use crate::engine::processes::Process;
use crate::store::Computed;

pub struct Work {
    begun: Instant,
    /// What earlier runs computed.
    before: Computed,
    /// CPU time of this run up to the last pause.
    cpu: Duration,
    /// CPU time of the processes when they began or went on.
    base: Duration,
}

impl Work {
    /// Of an application that has just been started or restarted; `processes` are its own.
    pub fn begin(processes: &[Process], before: Computed) -> Work {
        Work {
            begun: Instant::now(),
            before,
            cpu: Duration::ZERO,
            base: cpu_time(processes),
        }
    }

    /// What has been computed up to now, by all runs, and the CPU time of this run alone.
    pub fn pause(&mut self, processes: &[Process]) -> (Computed, Duration) {
        let now = cpu_time(processes);
        // Less than before: a process has left the tree, and took its time along.
        self.cpu += now.checked_sub(self.base).unwrap_or(now);
        self.base = now;
        let sum = |before: u64, more: Duration| {
            before.saturating_add(u64::try_from(more.as_millis()).unwrap_or(u64::MAX))
        };
        let computed = Computed {
            elapsed: sum(self.before.elapsed, self.begun.elapsed()),
            cpu: sum(self.before.cpu, self.cpu),
        };
        (computed, self.cpu)
    }

    pub fn go_on(&mut self, processes: &[Process]) {
        self.base = cpu_time(processes);
    }
}

/// CPU time of `processes`, and of what they have waited for.
fn cpu_time(processes: &[Process]) -> Duration {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten();
    let per_second = per_second.and_then(|ticks| u64::try_from(ticks).ok());
    let ticks: u64 = processes
        .iter()
        .filter_map(|process| {
            let stat = std::fs::read(format!("/proc/{}/stat", process.pid)).ok()?;
            ticks(&String::from_utf8_lossy(&stat))
        })
        .sum();
    Duration::from_millis(ticks.saturating_mul(1000) / per_second.unwrap_or(100).max(1))
}

/// Fields 14 to 17 of /proc/PID/stat: a process's own time and that of children it has waited for, in
/// user and kernel mode, in ticks. The command in parentheses may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields = rest.split_ascii_whitespace().skip(11).take(4);
    let numbers: Vec<u64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
    (numbers.len() == 4).then(|| numbers.iter().sum())
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;
    use crate::engine::processes::tree;

    #[test]
    fn times_are_read_from_stat() {
        let line =
            "12 (a) b 3) S 7 1 1 0 -1 4194560 1 0 0 0 10 20 300 4000 20 0 1 0 5 8192 42 1844";
        assert_eq!(ticks(line), Some(4330));
        assert_eq!(ticks("12 (a) S 7"), None);
    }

    #[test]
    fn what_is_computed_between_pauses_counts() {
        let before = Computed {
            elapsed: 60_000,
            cpu: 50_000,
        };
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let processes = tree(Pid::from_raw(child.id() as i32));
        let mut work = Work::begin(&processes, before);
        let until = |more: Duration| {
            let end = cpu_time(&processes) + more;
            let limit = Instant::now() + Duration::from_secs(60);
            while cpu_time(&processes) < end {
                assert!(Instant::now() < limit);
            }
        };
        until(Duration::from_millis(50));
        let (computed, cpu) = work.pause(&processes);
        assert!(cpu >= Duration::from_millis(50) && computed.cpu >= 50_050);
        assert!(computed.elapsed >= 60_000);
        until(Duration::from_millis(50));
        work.go_on(&processes);
        let (_, after) = work.pause(&processes);
        assert!(after < cpu + Duration::from_millis(50), "{cpu:?} {after:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
