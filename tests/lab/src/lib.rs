//! A real Slurm cluster on one machine, for the whole-system tests.
//!
//! [`Cluster::start`] brings up a login host with slurmctld and a number of nodes with slurmd, each
//! node with its own host name, processes, network, /tmp and /dev/shm, over a root file system of
//! one of three Slurm releases ([`Release`]). Users alice, bob and carol (who has no subordinate
//! ids) share /home; container images lie in /images. Nothing is left when a [`Cluster`] is dropped
//! or its process dies, however that happens. Many clusters can run at once. Needs root and the
//! packages of `tests/setup.sh`.

mod cache;
mod cluster;
mod conf;
mod dmtcp;
mod image;
mod root;

pub use cache::Entry;
pub use cluster::{Cluster, Job, Output, Process};
pub use conf::{File, Proctrack, Spec};
pub use dmtcp::{dmtcp, require_dmtcp};
pub use image::images;
pub use root::{Release, root};

/// Makes all root file systems and images, two at a time.
pub fn prepare() -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            root(Release::OldSlurm)?;
            root(Release::Sid).map(drop)
        });
        let images = images().map(drop);
        let others = others
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("making a root panicked")));
        images.and(others)
    })
}
