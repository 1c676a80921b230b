//! How a site has set up Slurm, as far as it decides whether a checkpoint comes in time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{SlurmError, command};

/// What `scontrol show config` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// E.g. `24.11.5`.
    pub version: String,
    /// From SIGTERM to SIGKILL, at least 5 s whatever is configured.
    pub kill_wait: Duration,
    /// Whether jobs may be requeued unless they say otherwise.
    pub requeue: bool,
    /// E.g. `proctrack/cgroup`.
    pub proctrack: String,
    /// `PreemptMode`, e.g. `OFF` or `GANG,REQUEUE`.
    pub preempt: String,
    /// Directories of plugins.
    pub plugin_dirs: Vec<PathBuf>,
    pub plugstack: PathBuf,
}

/// A queue, as far as it decides how much time a pre-empted job has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub name: String,
    /// Seconds between the first signal of a pre-emption and KillWait.
    pub grace: Duration,
    pub preempt: String,
    default: bool,
}

/// Asks the controller.
pub fn site() -> Result<Site, SlurmError> {
    let text = command::run("scontrol", &["show", "config"])?;
    Ok(Site::parse(&text))
}

/// The partition called `name`, or the default one. `None`: there is none such.
pub fn partition(name: Option<&str>) -> Result<Option<Partition>, SlurmError> {
    let text = command::run("scontrol", &["show", "partition", "-o"])?;
    // Of several (`-p a,b`) Slurm takes any: the first named stands for them.
    let name = name.and_then(|name| name.split(',').next());
    Ok(text.lines().map(Partition::parse).find(|found| match name {
        Some(name) => found.name == name,
        None => found.default,
    }))
}

impl Site {
    pub(super) fn parse(text: &str) -> Site {
        let value = |key: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(name, _)| name.trim() == key)
                .map_or("", |(_, value)| value.trim())
        };
        let conf = match value("SLURM_CONF") {
            "" => "/etc/slurm/slurm.conf",
            path => path,
        };
        // 22.05 prints the default, 24.11 `(null)`.
        let plugstack = match value("PlugStackConfig") {
            path if path.starts_with('/') => path.into(),
            _ => Path::new(conf).with_file_name("plugstack.conf"),
        };
        Site {
            version: value("SLURM_VERSION").to_owned(),
            // `30 sec`; _slurm_rpc_… of stepd waits MAX(KillWait, 5).
            kill_wait: seconds(value("KillWait")).max(Duration::from_secs(5)),
            requeue: value("JobRequeue") != "0",
            proctrack: value("ProctrackType").to_owned(),
            preempt: value("PreemptMode").to_owned(),
            plugin_dirs: value("PluginDir").split(':').map(PathBuf::from).collect(),
            plugstack,
        }
    }
}

impl Partition {
    pub(super) fn parse(line: &str) -> Partition {
        let value = |key: &str| {
            line.split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
                .unwrap_or("")
        };
        Partition {
            name: value("PartitionName").to_owned(),
            grace: seconds(value("GraceTime")),
            preempt: value("PreemptMode").to_owned(),
            default: value("Default") == "YES",
        }
    }
}

/// `30 sec`, `30`; anything else is 0.
fn seconds(text: &str) -> Duration {
    let number = text.split(' ').next().and_then(|word| word.parse().ok());
    Duration::from_secs(number.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_scontrol_prints_is_read() {
        let site = Site::parse(
            "Configuration data as of 2026-11-26T10:49:00\nJobRequeue              = 0\n\
             KillWait                = 45 sec\nPluginDir               = /a:/b\n\
             PlugStackConfig         = (null)\nPreemptMode             = REQUEUE\n\
             ProctrackType           = proctrack/cgroup\nSLURM_CONF              = /e/slurm.conf\n\
             SLURM_VERSION           = 24.11.5\n",
        );
        assert_eq!(site.kill_wait, Duration::from_secs(45));
        assert!(!site.requeue);
        assert_eq!(site.plugstack, Path::new("/e/plugstack.conf"));
        assert_eq!(site.plugin_dirs, [Path::new("/a"), Path::new("/b")]);
        assert_eq!(Site::parse("").kill_wait, Duration::from_secs(5));

        let queue = "PartitionName=grace Default=YES GraceTime=15 PreemptMode=REQUEUE";
        let queue = Partition::parse(queue);
        assert_eq!((&queue.name[..], queue.default), ("grace", true));
        assert_eq!(queue.grace, Duration::from_secs(15));
    }
}
