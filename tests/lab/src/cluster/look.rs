//! Looking at a cluster: processes, mounts, logs, and what is left of jobs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::process::Process;
use super::{Cluster, POLL};

impl Cluster {
    /// All processes of the cluster, nodes included.
    pub fn processes(&self) -> Vec<Process> {
        let Ok(entries) = fs::read_dir(self.path("/proc")) else {
            return Vec::new();
        };
        let mut found: Vec<Process> = entries
            .flatten()
            // One that ended meanwhile is none.
            .filter_map(|entry| Process::read(&entry.path()))
            .collect();
        found.sort_by_key(|process| process.pid);
        found
    }

    /// Processes that jobs and commands have left: all but the cluster's own daemons.
    pub fn leftover_processes(&self) -> Vec<Process> {
        let mut all = self.processes();
        all.retain(|process| !process.is_daemon());
        all
    }

    /// Mounts beyond those of a cluster at rest, on the login host and on the nodes.
    pub fn leftover_mounts(&self) -> Vec<String> {
        let none = Vec::new();
        self.mounts()
            .into_iter()
            .flat_map(|(host, mounts)| {
                let before = self.baseline.get(&host).unwrap_or(&none);
                let new: Vec<String> = mounts
                    .into_iter()
                    .filter(|mount| !before.contains(mount))
                    .map(|mount| format!("{host}: {mount}"))
                    .collect();
                new
            })
            .collect()
    }

    /// Waits until no process and no mount is left of jobs and commands.
    pub fn wait_nothing_left(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let (processes, mounts) = (self.leftover_processes(), self.leftover_mounts());
            if processes.is_empty() && mounts.is_empty() {
                return Ok(());
            }
            if start.elapsed() >= limit {
                let left: Vec<String> = processes
                    .iter()
                    .map(Process::to_string)
                    .chain(mounts)
                    .collect();
                return Err(self.explain(anyhow!(
                    "after {limit:?} there is left:\n{}",
                    left.join("\n")
                )));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Mounts ("type source on point") of the login host and each running node.
    pub(super) fn mounts(&self) -> BTreeMap<String, Vec<String>> {
        let mut pids = BTreeMap::from([("login".to_owned(), self.login)]);
        pids.extend(
            self.nodes()
                .iter()
                .map(|(name, node)| (name.clone(), node.on_host)),
        );
        pids.into_iter()
            .map(|(host, pid)| {
                let text = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap_or_default();
                let mounts = text.lines().filter_map(|line| {
                    let words: Vec<&str> = line.split(' ').collect();
                    Some(format!(
                        "{} {} on {}",
                        words.get(2)?,
                        words.first()?,
                        words.get(1)?
                    ))
                });
                (host, mounts.collect())
            })
            .collect()
    }

    /// The last lines of the logs of slurmctld, slurmd and of the cluster's own scripts.
    pub fn logs(&self) -> String {
        let slurm = self.directory.join("upper/var/log/slurm");
        let mut logs = vec![("the cluster's scripts".to_owned(), self.script_text())];
        let nodes = self
            .spec
            .node_names()
            .into_iter()
            .map(|name| format!("slurmd.{name}.log"));
        for name in std::iter::once("slurmctld.log".to_owned()).chain(nodes) {
            let log = fs::read(slurm.join(&name)).unwrap_or_default();
            logs.push((name, String::from_utf8_lossy(&log).into_owned()));
        }
        logs.retain(|(_, text)| !text.is_empty());
        logs.iter()
            .map(|(name, text)| format!("--- {name}\n{}\n", tail(text, 25)))
            .collect()
    }

    fn script_text(&self) -> String {
        let mut bytes = vec![0; 64 * 1024];
        let length = self.script_log.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
