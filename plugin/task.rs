//! In slurmstepd, as the user, in the process that is about to become a task: the options become
//! variables and the helper is put in front of the command.

use std::ffi::{CStr, CString};

use crate::multi_prog;
use crate::options::{IMAGE, NAME, OPTIONS, environment_form};
use crate::spank::{Spank, is_loaded, text};
use crate::state::State;
use crate::words::variable;

/// Ids of steps that are none of `srun`'s: SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT and
/// SLURM_INTERACTIVE_STEP of `slurm/slurm.h`, the same from 22.05 to 26.05.
const BATCH: u32 = 0xffff_fffb;
const EXTERN: u32 = 0xffff_fffc;
const INTERACTIVE: u32 = 0xffff_fffa;

/// Wraps the task if it asked for it. An error means that it asked and cannot have it.
pub fn wrap(spank: Spank, state: &mut State, asked: &dyn Fn(bool) -> bool) -> Result<(), String> {
    let step = spank.step_id()?;
    if step == BATCH {
        adopt_environment_form(spank, state);
    }
    let given = state.values[NAME].is_some();
    if !asked(given) || matches!(step, EXTERN | INTERACTIVE) {
        return forget_other_task(spank);
    }
    if !given {
        return Err("the value of --container-checkpoint did not arrive on this node".into());
    }
    if let Some(fault) = &state.settings.fault {
        return Err(fault.clone());
    }
    refuse_others_container(spank, state)?;
    let helper = text(state.settings.helper.clone());
    check_helper(&helper)?;
    for (option, value) in OPTIONS.iter().zip(&state.values) {
        set(spank, option.variable, value.as_deref())?;
    }
    let config = state.settings.config.clone().map(text);
    set(spank, variable::CONFIG, config.as_deref())?;
    set(
        spank,
        variable::STEP,
        Some(if step == BATCH { c"batch" } else { c"step" }),
    )?;
    set(spank, variable::PROCTRACK, proctrack())?;
    if spank.prepend(&[&helper, c"task", c"--"])? {
        return set(spank, variable::ARGV0, None);
    }
    let command = spank.command()?;
    if command
        .argument(1)
        .is_some_and(|argument| multi_prog::is_config(argument.to_bytes()))
    {
        return Err(
            "srun --multi-prog can be made resumable from Slurm 23.11 on, and this is an \
                    older one. Start the programs by steps of their own, or without \
                    --container-checkpoint"
                .into(),
        );
    }
    let old = command.replace_program(helper);
    let old = old.ok_or("could not put the helper in front of the task: it has no command")?;
    set(spank, variable::ARGV0, Some(&old))
}

/// A container that another plugin makes, such as Pyxis, does not have the helper in it, and what it
/// does to the process cannot be done again at a restart.
fn refuse_others_container(spank: Spank, state: &State) -> Result<(), String> {
    let name = OPTIONS[IMAGE].name;
    let ours = state.settings.option_name(IMAGE) == name && state.values[IMAGE].is_some();
    if ours || !spank.was_given(&text(name.into())) {
        return Ok(());
    }
    Err(format!(
        "--{name} is another plugin's here, and what runs in its containers cannot be made \
         resumable. Start an Apptainer container in the job instead: apptainer exec IMAGE COMMAND"
    ))
}

/// `sbatch --export=NONE` of Slurm 22.05 and 23.02 loses the batch step's options on the way, but
/// not the form in which the job's `srun`s find them.
fn adopt_environment_form(spank: Spank, state: &mut State) {
    if state.values[NAME].is_some() {
        return;
    }
    for index in 0..OPTIONS.len() {
        let form = text(environment_form(state.settings.option_name(index)).into_bytes());
        if !spank.has_env(&form) {
            // The first is NAME, without which the others mean nothing.
            if index == NAME {
                return;
            }
            continue;
        }
        state.values[index] = spank.env(&form);
    }
}

/// Removes the variables of a wrapped task that this one's environment was copied from. A user's
/// own, which come without STEP, stay.
fn forget_other_task(spank: Spank) -> Result<(), String> {
    if spank.has_env(&text(variable::STEP.into())) {
        for name in variable::OF_TASKS {
            set(spank, name, None)?;
        }
    }
    Ok(())
}

/// How this slurmstepd, of which this process is a copy, finds the processes of its step. None if it
/// is none of Slurm's own ways.
fn proctrack() -> Option<&'static CStr> {
    [
        (c"proctrack_cgroup.so", c"cgroup"),
        (c"proctrack_linuxproc.so", c"linuxproc"),
        (c"proctrack_pgid.so", c"pgid"),
    ]
    .into_iter()
    .find_map(|(file, kind)| is_loaded(file).then_some(kind))
}

fn set(spank: Spank, name: &str, value: Option<&CStr>) -> Result<(), String> {
    let name = text(name.into());
    match value {
        Some(value) => spank.set_env(&name, value),
        None if spank.has_env(&name) => spank.unset_env(&name),
        None => Ok(()),
    }
}

/// Slurm would say no more than that `execve` failed.
fn check_helper(helper: &CString) -> Result<(), String> {
    // SAFETY: a terminated string, which is only read.
    if unsafe { libc::access(helper.as_ptr(), libc::X_OK) } == 0 {
        return Ok(());
    }
    let why = std::io::Error::last_os_error();
    Err(format!(
        "the helper {} cannot be run on this node: {why}. The administrator has to install it \
         there, or to name its path in plugstack.conf by helper=PATH",
        helper.to_string_lossy()
    ))
}
