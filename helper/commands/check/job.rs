//! Findings about a job that is to be submitted.

use std::ffi::OsString;
use std::str::FromStr;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::engines::{self, Asked};
use super::script::{self, Around};
use super::submitted::Submitted;
use super::{Check, Common, Findings, Level, Of, containers, state};
use crate::config::{Config, EngineChoice};
use crate::container::command_line::{self, Understood};
use crate::container::gpu;
use crate::engine::{Placement, known};
use crate::slurm::srun::Srun;
use crate::store::Store;
use crate::task::{self, Request};
use crate::words::{ENGINE_RULE, PLACEMENT_RULE};

use Level::{Problem, Warning};

/// After this time at a submission, which waits for 10 s at most, no further line of the script is begun
/// with.
const SCRIPT_LIMIT: Duration = Duration::from_secs(4);

/// Looks at everything a job needs.
pub fn look(check: &Check, found: &mut Findings) {
    let begun = Instant::now();
    let submitted = match (&check.script, check.submission) {
        (Some(path), _) => match Submitted::by_script(path) {
            Ok(submitted) => submitted,
            Err(why) => {
                let cause = format!("cannot use {}: {why}", path.display());
                let cure = "name the script that you give to sbatch";
                return found.add(Problem, Of::Job, "script", cause, cure);
            }
        },
        (None, Some(_)) => Submitted::by_parent(),
        (None, None) => Submitted::default(),
    };
    let request = Request {
        name: check.name.clone(),
        image: check.image.clone(),
        engine: check.engine.clone(),
        placement: check.placement.clone(),
        config: check.common.config.clone(),
        apptainer_options: check.apptainer_options.clone(),
        ..Request::default()
    };
    let mut request = match check.script {
        // In Slurm's order: an option of ours, a variable, a line of the script.
        Some(_) => {
            let srun = Srun::ask().unwrap_or_default();
            let script = submitted.request(srun.image_option().unwrap_or("container-image"));
            request.or_else(Request::from_environment()).or_else(script)
        }
        None => request.or_else(Request::from_environment()),
    };
    let config = match Config::load(request.config.as_deref()) {
        Ok(config) => config,
        Err(why) => {
            let cure =
                "correct the file, or have its administrator do it: jobs fail at their start";
            return found.add(Problem, Of::Job, "config", why.to_string(), cure);
        }
    };
    let wanted = match request.engine.as_deref().map(EngineChoice::from_str) {
        None => config.engine,
        Some(Ok(wanted)) => wanted,
        Some(Err(why)) => {
            return found.add(Problem, Of::Job, "engine", why, ENGINE_RULE);
        }
    };
    let common = Common {
        // Elsewhere a variable is taken as it is.
        dir: (check.common.dir.clone()).or_else(|| check.script.as_ref().and(request.dir.clone())),
        ..check.common.clone()
    };
    let store = state::store(&common, &config, found);
    let submission = check.submission.is_some();
    let last = state::name(&request, submission, store.as_ref(), found);
    let mut refused_gpu = false;
    // What a job keeps in its store has to be somewhere, even if that one cannot be used.
    let scratch = match store {
        Some(_) => None,
        None => tempfile::tempdir().ok(),
    };
    let instead = |scratch: &TempDir| Store::open(&scratch.path().join("store")).ok();
    if let Some(store) = store.clone().or_else(|| instead(scratch.as_ref()?)) {
        // What runs in a container starts none.
        let script = submitted.script().filter(|_| request.image.is_none());
        let starts = script.is_some_and(|script| {
            let around = Around {
                request: &request,
                config: &config,
                store: &store,
                submission,
                until: submission.then(|| begun + SCRIPT_LIMIT),
            };
            script::look(&script, &around, found)
        });
        let command = match check.command.is_empty() {
            // A script on the host is not saved itself.
            true if starts => None,
            true => Some(submitted.interpreter()),
            false => understood(&mut request, &check.command, &store, found),
        };
        let place = command.and_then(|command| {
            let place = containers::place(&request, &config, &last, submission, &store, found)?;
            Some((command, place))
        });
        if let Some((command, place)) = place {
            if let Some(why) = task::on_gpus(&place) {
                refused_gpu = true;
                found.told(Problem, Of::Job, "gpu", &why, "ask for no GPUs");
            }
            match task::placement(&request, &config, &place, wanted) {
                Ok((wanted, placement)) => {
                    // Without a command the image is not looked into.
                    let shell = task::shell_of(&request);
                    let placement = match command.is_empty() && shell.is_none() {
                        true => placement.or(Some(Placement::Injected)),
                        false => placement,
                    };
                    let asked = Asked {
                        config: &config,
                        wanted,
                        placement,
                        shell,
                        submission,
                    };
                    engines::look(&asked, &place, &command, &store, &last, found);
                }
                Err(why) => {
                    let why = format!("{why:#}");
                    found.add(Problem, Of::Job, "engine", why, PLACEMENT_RULE);
                }
            }
        }
    }
    if !refused_gpu {
        gpu(&request, &submitted, submission, found);
    }
    if let Some(store) = &store {
        state::room(store, &last, found);
    }
    let partition = check
        .partition
        .clone()
        .or_else(|| submitted.partition())
        .or_else(|| of_job(submission, "SLURM_JOB_PARTITION"));
    let batch_step = submitted.batch && request.image.is_some();
    state::time(&config, partition, batch_step, &last, found);
}

/// What runs in the end for `command`, one that starts Apptainer included; `None` if that is nothing
/// that could be looked at.
fn understood(
    request: &mut Request,
    command: &[OsString],
    store: &Store,
    found: &mut Findings,
) -> Option<Vec<OsString>> {
    if request.image.is_some() {
        return Some(command.to_vec());
    }
    match command_line::understand(command, &store.options_memory()) {
        Ok(Understood::Container(line)) => Some(request.in_container(line)),
        Ok(Understood::Foreign) => Some(command.to_vec()),
        Ok(Understood::Passthrough) => {
            let cause = "it starts no application of its own: there is nothing to save";
            let cure = "make the command that runs the application resumable";
            found.add(Warning, Of::Job, "program", cause, cure);
            None
        }
        Err(why) => {
            let cure = "see whether the command runs without checkpoints";
            found.told(Problem, Of::Job, "program", &why.to_string(), cure);
            None
        }
    }
}

/// A variable of the job around this check; at submission that is another job.
fn of_job(submission: bool, name: &str) -> Option<String> {
    let outer = submission && std::env::var_os("SLURM_JOB_ID").is_some();
    let value = std::env::var(name).ok();
    value.filter(|value| !outer && !value.is_empty())
}

/// Whether the job has a GPU.
fn gpu(request: &Request, submitted: &Submitted, submission: bool, found: &mut Findings) {
    let variable = |name: &str| of_job(submission && name.starts_with("SLURM_"), name);
    let by = || gpu::asked(&request.apptainer_options, request.line.as_ref(), variable);
    if let Some(by) = submitted.gpu().or_else(by) {
        let known::Doubt { cause, cure } = known::gpu(&by);
        found.add(Warning, Of::Job, "gpu", cause, cure);
    }
}
