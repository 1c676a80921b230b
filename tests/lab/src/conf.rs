//! What a cluster is to be, and its slurm.conf. No I/O.

use std::path::PathBuf;

use crate::root::Release;

/// Which plugin of Slurm keeps track of a job's processes, and so decides who gets its signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proctrack {
    /// Signals reach the direct children of slurmstepd.
    Cgroup,
    /// Signals reach the whole process tree.
    Linuxproc,
}

/// A file put into the root file system before anything starts. Owned by root.
#[derive(Debug, Clone)]
pub struct File {
    /// Absolute, as the cluster sees it.
    pub path: PathBuf,
    pub contents: Vec<u8>,
    pub mode: u32,
}

/// A cluster to start. The default is a plain one without the plugin.
#[derive(Debug, Clone)]
pub struct Spec {
    pub release: Release,
    pub proctrack: Proctrack,
    /// Number of nodes: n1, n2… 1 to 9.
    pub nodes: u32,
    /// CPUs that each node claims to have.
    pub cpus: u32,
    /// Seconds between SIGTERM and SIGKILL.
    pub kill_wait_s: u32,
    /// Seconds of GraceTime in the partition `grace`.
    pub grace_time_s: u32,
    /// A requeued job may start again about twice this many seconds later; at least 5.
    pub cred_expire_s: u32,
    /// The plugin's .so, installed as `container_checkpoint.so`.
    pub plugin: Option<PathBuf>,
    /// Whether plugstack.conf says `required` or `optional`.
    pub plugin_required: bool,
    /// Words after the plugin's file name in plugstack.conf.
    pub plugstack: Vec<String>,
    /// The helper, installed as `/usr/bin/container-checkpoint`.
    pub helper: Option<PathBuf>,
    /// The text of `/etc/slurm/container-checkpoint.yaml`.
    pub config: Option<String>,
    /// Lines appended to slurm.conf.
    pub slurm_conf: String,
    /// Whether this machine's DMTCP, where there is one, is installed on the nodes.
    pub dmtcp: bool,
    /// Whether `/images` is there (made when it is missing, which takes a while the first time).
    pub images: bool,
    pub files: Vec<File>,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            release: Release::Trixie,
            proctrack: Proctrack::Cgroup,
            nodes: 2,
            cpus: 2,
            kill_wait_s: 30,
            grace_time_s: 15,
            cred_expire_s: 5,
            plugin: None,
            plugin_required: true,
            plugstack: Vec::new(),
            helper: None,
            config: None,
            slurm_conf: String::new(),
            dmtcp: true,
            images: true,
            files: Vec::new(),
        }
    }
}

/// Addresses from the block for documentation: they are only used inside a cluster's own network.
const NETWORK: &str = "192.0.2";

pub(crate) fn login_address() -> String {
    format!("{NETWORK}.1/24")
}

/// The address with prefix length of node `number`, counted from 1.
pub(crate) fn node_address(number: u32) -> String {
    format!("{NETWORK}.{}/24", 10 + number)
}

impl Spec {
    /// The names of the nodes.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes)
            .map(|number| format!("n{number}"))
            .collect()
    }

    pub(crate) fn hosts(&self) -> String {
        let mut text = format!("127.0.0.1 localhost\n{NETWORK}.1 login\n");
        for number in 1..=self.nodes {
            text += &format!("{NETWORK}.{} n{number}\n", 10 + number);
        }
        text
    }

    pub(crate) fn plugstack_conf(&self) -> String {
        let kind = if self.plugin_required {
            "required"
        } else {
            "optional"
        };
        let words: String = self
            .plugstack
            .iter()
            .map(|word| format!(" {word}"))
            .collect();
        format!("{kind} container_checkpoint.so{words}\n")
    }

    /// Two queues that can be pre-empted, one that pre-empts; everything on every node.
    pub(crate) fn slurm_conf(&self) -> String {
        let Spec {
            nodes,
            cpus,
            kill_wait_s,
            grace_time_s,
            cred_expire_s,
            ..
        } = self;
        let proctrack = match self.proctrack {
            Proctrack::Cgroup => "proctrack/cgroup",
            Proctrack::Linuxproc => "proctrack/linuxproc",
        };
        let all = if *nodes == 1 {
            "n1".to_owned()
        } else {
            format!("n[1-{nodes}]")
        };
        // From 25.11 on the wait before a requeued job may start again has an option of its own.
        let requeue_delay = match self.release {
            Release::Sid => ",requeue_delay=1",
            Release::OldSlurm | Release::Trixie => "",
        };
        format!(
            "\
ClusterName=lab
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire={cred_expire_s}
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType={proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait_s}
MessageTimeout=60
BatchStartTimeout=60
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=10000,batch_sched_delay=0,bf_interval=2{requeue_delay}
NodeName={all} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 State=UNKNOWN
PartitionName=DEFAULT Nodes={all} MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=normal Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_time_s}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
{}
",
            self.slurm_conf
        )
    }
}

/// Nothing is constrained: proctrack is all that is wanted of control groups, and the v1 freezer all
/// that it needs. Unlike v2, that works wherever a cluster may run.
pub(crate) const CGROUP_CONF: &str = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n";
