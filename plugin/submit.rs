//! In `sbatch`, `salloc` and `srun`: values are checked where the user sees the answer, and what a
//! job around this command left behind is not taken for the user's wish.

use crate::options::{IMAGE, NAME, OPTIONS, environment_form, passing_form};
use crate::settings::Settings;
use crate::state::State;
use crate::words::variable;

/// Removes from this process what a job around it has left for its own steps: without this,
/// `sbatch other.sh` in a resumable job would make the other job resumable under the same NAME.
///
/// Only for `sbatch` and `salloc`: an `srun` inside a job is a step of that job and has its options.
pub fn forget_outer_job(settings: &Settings) {
    if std::env::var_os("SLURM_JOB_ID").is_none() {
        return;
    }
    for index in 0..OPTIONS.len() {
        let name = settings.option_name(index);
        unset(&environment_form(name));
        unset(&passing_form(name));
    }
    // Without STEP they are no task's but the user's own.
    if std::env::var_os(variable::STEP).is_some() {
        variable::OF_TASKS.iter().for_each(|name| unset(name));
    }
}

fn unset(name: &str) {
    // SAFETY: sbatch and salloc run their plugins' init before they start any thread.
    unsafe { std::env::remove_var(name) }
}

/// Whether the options given fit each other; the error is for the user.
pub fn check(state: &State) -> Result<(), String> {
    if state.values[IMAGE].is_none() || state.values[NAME].is_some() {
        return Ok(());
    }
    let image = state.settings.option_name(IMAGE);
    let name = state.settings.option_name(NAME);
    Err(format!(
        "--{image} is possible only together with --{name}=NAME, which makes the job resumable \
         under NAME. To run in a container without that, start it in the job: apptainer exec IMAGE \
         COMMAND"
    ))
}
