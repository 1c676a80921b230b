//! Who this process is, for the lock on a NAME, and whether another holder's run is over.

use crate::slurm::{self, Job, JobView, Phase, SlurmError};
use crate::store::{self, Holder, Witness};

/// The name of this machine as Slurm knows it, else the host name.
pub fn host() -> String {
    std::env::var("SLURMD_NODENAME")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| {
            nix::unistd::gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_else(|_| "unknown".into())
        })
}

/// This process as a holder.
pub fn own(job: Option<&Job>) -> store::Result<Holder> {
    let step = job.map_or_else(|| "none".into(), |job| job.step.to_string());
    let holder = Holder::this_process(job.map(|job| job.id), &step, job.map_or(0, |job| job.run))?;
    Ok(Holder {
        host: host(),
        ..holder
    })
}

/// Slurm as the witness of what became of holders on other machines.
pub struct Slurm;

impl Witness for Slurm {
    fn run_has_ended(&self, holder: &Holder) -> Option<bool> {
        let job = holder.job?;
        match slurm::view(job) {
            Ok(view) => Some(over(&view, holder.run)),
            Err(SlurmError::Unknown(_)) => Some(true),
            Err(why) => {
                log::debug!("whether job {job} has ended is not known: {why}");
                None
            }
        }
    }
}

/// Whether run `run` of a job is over. A completing job still has processes; a pending one, or one
/// in a later run, has none of this run any more.
fn over(view: &JobView, run: u32) -> bool {
    match view.phase {
        Phase::Running | Phase::Suspended => view.restarts > run,
        Phase::Pending => true,
        _ => !view.state.contains("COMPLETING"),
    }
}
