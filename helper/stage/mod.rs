//! Containers that a batch script on the host starts by itself, without srun: each is a *stage* of
//! the script, kept resumable under `NAME/ORDINAL`.
//!
//! ```text
//!   slurmstepd ── helper (supervise::script) ── bash job.sh ── apptainer exec …   = this, by PATH
//!                    └───────────── SIGTERM ──────────────────────► helper ── engine, application
//! ```
//!
//! Contract: the script gets a directory at the front of PATH, in which `apptainer` and `singularity`
//! are this helper under another name. [`main`] is what it does then: of a container that runs an
//! application it makes a stage, everything else becomes the program that the script would have
//! got. A `container-checkpoint run --name OTHER` in such a script is a stage as well, in the cell
//! OTHER. It steps aside wherever somebody else keeps the application already: in a step, in
//! another job, in a script whose helper is gone.

mod claim;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::Pid;

pub use claim::{Identity, claim};

use crate::container::{command_line, wrapper};
use crate::engine::criu::files::appends;
use crate::logging;
use crate::slurm;
use crate::store::{self, Cell, Holder};
use crate::words::variable;

/// The hidden command that a caught program becomes, with an environment in which nothing is caught
/// any more.
pub const STAGE: &str = "stage";

/// What is caught.
const CAUGHT: [&str; 2] = ["apptainer", "singularity"];

/// Of the NAME's directory: what catches them, for scripts that set PATH themselves; and of that one
/// the part that is in PATH, with those of them that are installed.
const DIRECTORY: &str = "bin";
const FOUND: &str = "found";

/// Variables for a script, by which its containers are caught.
///
/// # Errors
/// The directory cannot be made.
pub fn variables(name: &Cell) -> io::Result<Vec<(OsString, OsString)>> {
    let dir = name.dir().join(DIRECTORY);
    let found = dir.join(FOUND);
    let ourselves = std::env::current_exe()?;
    for dir in [&dir, &found] {
        store::disk::private_dir(dir, false).map_err(io::Error::other)?;
    }
    for program in CAUGHT {
        // A script may well look which of the two there is.
        let installed = command_line::find(program.as_ref()).is_some();
        for (dir, wanted) in [(&dir, true), (&found, installed)] {
            let link = dir.join(program);
            let there = std::fs::read_link(&link).ok();
            if there.as_ref() != Some(&ourselves) || !wanted {
                store::disk::remove(&link).map_err(io::Error::other)?;
                if wanted {
                    std::os::unix::fs::symlink(&ourselves, &link)?;
                }
            }
        }
    }
    let mut path = found.into_os_string();
    if let Some(search) = std::env::var_os("PATH") {
        path.push(":");
        path.push(search);
    }
    Ok(vec![
        ("PATH".into(), path),
        (variable::STAGES.into(), dir.into()),
    ])
}

/// Whether this process was started as one of the programs that are caught.
pub fn is_caught(argv0: &OsStr) -> bool {
    wrapper::is_apptainer(argv0)
}

/// What this process does under a caught program's name; returns only if it cannot become the one
/// or the other.
pub fn main(words: &[OsString]) -> String {
    let batch = std::env::var(variable::STEP).is_ok_and(|step| step == slurm::BATCH);
    let ours = batch
        && std::env::var_os(variable::STAGES).is_some()
        // An srun that no plugin has seen, below the script.
        && slurm::step_of_srun(|name| std::env::var(name).ok()).is_none();
    if !ours {
        return pass_through(words);
    }
    // As the script has written it, whatever led here.
    let name = words.first().map(Path::new).and_then(Path::file_name);
    let stage = [OsStr::new(STAGE)].into_iter();
    let name = name.into_iter();
    again(
        stage
            .chain(name)
            .chain(words.iter().skip(1).map(OsString::as_os_str)),
    )
}

/// Where this process's environment catches programs, begins it again in one that does not; returns
/// what is wrong if that fails.
pub fn uncaught() -> Option<String> {
    std::env::var_os(variable::STAGES)?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    Some(again(arguments.iter().map(OsString::as_os_str)))
}

/// Becomes the helper with `arguments`, in an environment in which nothing is caught any more; returns
/// what is wrong if that fails.
fn again<'a>(arguments: impl Iterator<Item = &'a OsStr>) -> String {
    let mut command = match std::env::current_exe() {
        Ok(ourselves) => Command::new(ourselves),
        Err(why) => return format!("cannot find this program: {why}"),
    };
    command.arg0("container-checkpoint").args(arguments);
    clean(&mut command);
    format!("cannot start the helper: {}", command.exec())
}

/// The helper that stands before this stage's script, if it does.
pub fn script(name: &Cell, me: &Holder) -> store::Result<Option<Holder>> {
    let here = |holder: &Holder| (holder.boot_id.clone(), holder.pid_namespace);
    Ok(name.holder()?.filter(|script| {
        (script.job, script.run, script.step.as_str()) == (me.job, me.run, slurm::BATCH)
            && here(script) == here(me)
    }))
}

/// Has messages go to the job's own standard error, which `script`'s helper has, rather than to what
/// the script makes of a stage's: it may read that.
pub fn speak_for(script: &Holder) -> io::Result<()> {
    let path = PathBuf::from(format!("/proc/{}/fd/2", script.pid));
    let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/2", script.pid));
    // A file that is not appended to would be written over.
    let file = match info.is_ok_and(|info| appends(&info)) {
        true => File::options().append(true).open(path),
        false => Err(io::ErrorKind::Unsupported.into()),
    };
    logging::redirect(match file {
        Ok(file) => file,
        Err(_) => io::stderr().as_fd().try_clone_to_owned()?.into(),
    });
    Ok(())
}

/// Whether standard input is a pipe that the script itself reads as well, as in
/// `… | while read line; do apptainer …; done`. What is read of it there belongs to nobody alone.
pub fn shares_input() -> bool {
    let input = |pid: i32| std::fs::read_link(format!("/proc/{pid}/fd/0")).ok();
    let Some(own) = input(std::process::id().cast_signed()) else {
        return false;
    };
    if !own.to_string_lossy().starts_with("pipe:") {
        return false;
    }
    let mut parent = nix::unistd::getppid().as_raw();
    // These wait for their command and read nothing.
    while let Some(stat) = crate::front::stat(parent)
        && ["timeout", "time", "nice", "stdbuf"].contains(&stat.comm.as_str())
    {
        parent = stat.parent;
    }
    input(parent).as_ref() == Some(&own)
}

/// Ends this process with all that it has started once the script's helper is gone: nobody would
/// tell it when the job ends, and Slurm may start the job again.
pub fn end_with(script: &Holder) -> io::Result<()> {
    let pid = i32::try_from(script.pid).map_err(io::Error::other)?;
    let helper = crate::sys::pidfd(Pid::from_raw(pid))?;
    std::thread::Builder::new()
        .name("script".into())
        .spawn(move || {
            if crate::sys::readable(&helper, None).is_ok() {
                crate::supervise::kill_children();
                crate::sys::die_of(libc::SIGKILL);
            }
        })
        .map(drop)
}

/// Device and inode of the job's own output files, which `script`'s helper has.
pub fn output_of(script: &Holder) -> Vec<(u64, u64)> {
    [1, 2]
        .iter()
        .filter_map(|stream| {
            let path = format!("/proc/{}/fd/{stream}", script.pid);
            // One that cannot be seen is taken for another file, which is recorded: no harm.
            let about = std::fs::metadata(path).ok()?;
            Some((about.dev(), about.ino()))
        })
        .collect()
}

/// The stages of this run that live, under the script's NAME or one of their own, with their cells.
/// Their helpers are processes of this node.
pub fn living(name: &Cell, script: &Holder) -> store::Result<Vec<(Cell, Holder)>> {
    let mut cells = name.steps()?;
    let store = name.store();
    // Each `container-checkpoint run` in the script has a name of its own.
    cells.extend(store.names()?.iter().map(|name| store.name(name)));
    let mut living = Vec::new();
    for cell in cells {
        let live = || -> store::Result<Option<Holder>> {
            let Some(holder) = cell.holder()? else {
                return Ok(None);
            };
            let ours = (holder.job, holder.run, holder.step.as_str())
                == (script.job, script.run, slurm::STAGE);
            let lives = ours && cell.holder_has_ended(script, &store::Unwitnessed)? == Some(false);
            Ok(lives.then_some(holder))
        };
        match live() {
            Ok(Some(holder)) => living.push((cell, holder)),
            Ok(None) => {}
            // One name that is damaged must not keep the others from being told.
            Err(why) => log::debug!("{}: {why}", cell.label()),
        }
    }
    Ok(living)
}

/// Becomes the program that `words` names; returns what is wrong if that fails.
pub fn pass_through(words: &[OsString]) -> String {
    let Some((name, arguments)) = words.split_first() else {
        return "there is no command".into();
    };
    let name = Path::new(name).file_name().unwrap_or(name);
    let Some(program) = command_line::find(name) else {
        return format!("{}: command not found", name.display());
    };
    let mut command = Command::new(&program);
    command.arg0(name).args(arguments);
    clean(&mut command);
    format!("cannot run {}: {}", program.display(), command.exec())
}

/// Takes what catches programs out of the environment of `command`.
fn clean(command: &mut Command) {
    let Some(dir) = std::env::var_os(variable::STAGES) else {
        return;
    };
    command.env_remove(variable::STAGES);
    if let Some(search) = std::env::var_os("PATH") {
        let rest = std::env::split_paths(&search).filter(|entry| !entry.starts_with(&dir));
        // What was taken apart at colons can be put together again.
        if let Ok(rest) = std::env::join_paths(rest.collect::<Vec<PathBuf>>()) {
            command.env("PATH", rest);
        }
    }
}
