//! How much time Slurm leaves a job between the first signal and the last, by its configuration.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::SlurmError;
use super::site::{self, Partition, Site};

/// The times that decide how long a job has to save itself, as the configuration has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// From SIGTERM to SIGKILL.
    pub kill_wait: Duration,
    /// GraceTime of the job's partition. That of a QOS is not seen here.
    pub grace_time: Duration,
    /// Whether jobs of the partition may be pre-empted so that they end (PreemptMode REQUEUE or
    /// CANCEL, not OFF, SUSPEND or GANG alone).
    pub preemptible: bool,
}

impl Notice {
    /// That of jobs in `partition`, by asking Slurm twice.
    pub fn of(partition: &str) -> Result<Notice, SlurmError> {
        let site = site::site()?;
        let partition = site::partition(Some(partition))?;
        Ok(Notice::new(&site, partition.as_ref()))
    }

    /// That of jobs in `partition`, or of all where nothing is known of it.
    pub fn new(site: &Site, partition: Option<&Partition>) -> Notice {
        // A partition prints the cluster's mode where it has none of its own.
        let mode = partition.map_or(&site.preempt, |partition| &partition.preempt);
        Notice {
            kill_wait: site.kill_wait,
            grace_time: partition.map_or(Duration::ZERO, |partition| partition.grace),
            preemptible: mode
                .split(',')
                .any(|word| matches!(word, "REQUEUE" | "CANCEL")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_that_end_a_job_count() {
        for (mode, expected) in [
            ("REQUEUE", true),
            ("GANG,REQUEUE", true),
            ("CANCEL", true),
            ("OFF", false),
            ("GANG,SUSPEND", false),
            ("SUSPEND", false),
        ] {
            let site = Site::parse(&format!("KillWait = 30 sec\nPreemptMode = {mode}\n"));
            let words = format!("PartitionName=x PreemptMode={mode} GraceTime=15");
            let partition = Partition::parse(&words);
            let mut notice = Notice {
                kill_wait: Duration::from_secs(30),
                grace_time: Duration::from_secs(15),
                preemptible: expected,
            };
            assert_eq!(Notice::new(&site, Some(&partition)), notice, "{mode}");
            notice.grace_time = Duration::ZERO;
            assert_eq!(Notice::new(&site, None), notice, "{mode}");
        }
    }
}
