//! The commands for people: what is in the store, is it whole, keep it, copy it, take it away.
//!
//! Contract: [`run`] does one command and gives its exit code; results go to standard output (with
//! `--json` as the documents that docs/on-disk-format.md describes), everything else to standard
//! error. A command never disturbs a running job: what would change its state needs its lock.

mod around;
mod change;
pub mod check;
mod create;
pub mod evacuate;
mod look;
mod output;
pub mod save;
mod take_over;
mod transfer;
mod users;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

pub use around::main;

use crate::config::Config;
use crate::engine::{Kind, Placement};
use crate::store::{self, Cell, Entry, Error, Manifest, Name, StepKey, Store, Witness};

/// What exit codes mean, for `--help`.
pub const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 no such name or generation; 4 damaged; \
5 in use by a running job; of `check`: 6 warnings, 7 problems";

pub const OK: u8 = 0;
pub const FAILED: u8 = 1;
pub const USAGE: u8 = 2;
pub const ABSENT: u8 = 3;
pub const DAMAGED: u8 = 4;
pub const HELD: u8 = 5;

/// What commands need from around them.
pub struct Context<'a> {
    /// This user's store: `--dir`, the variable, or the configuration's.
    pub store: &'a Path,
    pub config: &'a Config,
    /// Asks Slurm about holders on other nodes.
    pub witness: &'a dyn Witness,
    /// The engine's look at a rank's files.
    pub verify: &'a dyn Fn(&Manifest, &Path) -> Result<(), String>,
    /// The engines of this node with their versions, for people.
    pub engines: &'a dyn Fn() -> Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a name's place in the store, and check what a run of it will need
    Create(Create),
    /// List names, or one name's generations
    List(List),
    /// Show what happened to a name, or what a generation is
    Show(Show),
    /// Compare every byte with what was saved
    Verify(Verify),
    /// Keep a generation from being deleted when newer ones are saved
    Pin(One),
    /// Take a pin away
    Unpin(One),
    /// Delete a name with all its generations, or one generation
    Delete(Delete),
    /// Delete what is not needed: older, bad and interrupted generations
    Prune(Prune),
    /// Copy a generation to a new name, from which another run can go on
    Clone(Clone),
    /// Write a generation into one file
    Export(Export),
    /// Read a generation from a file, checking all of it
    Import(Import),
    /// Take over a checkpoint of `apptainer instance start --dmtcp-launch NAME`
    ImportApptainer(ImportApptainer),
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The store to use instead of the configured one
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The configuration file
    #[arg(long)]
    pub config: Option<PathBuf>,
}

impl Command {
    /// What all commands have: the caller finds the store by it.
    pub fn common(&self) -> &Common {
        match self {
            Command::Create(Create { common, .. })
            | Command::List(List { common, .. })
            | Command::Show(Show { common, .. })
            | Command::Verify(Verify { common, .. })
            | Command::Pin(One { common, .. })
            | Command::Unpin(One { common, .. })
            | Command::Delete(Delete { common, .. })
            | Command::Prune(Prune { common, .. })
            | Command::Clone(Clone { common, .. })
            | Command::Export(Export { common, .. })
            | Command::Import(Import { common, .. })
            | Command::ImportApptainer(ImportApptainer { common, .. }) => common,
        }
    }
}

#[derive(Debug, Args)]
pub struct Create {
    /// The new NAME
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct List {
    /// List the generations of this NAME
    pub name: Option<String>,
    /// List the stores of all users (root only)
    #[arg(long, conflicts_with = "name")]
    pub all_users: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Show {
    /// NAME, NAME/STEP or NAME@GENERATION
    pub name: String,
    /// How many of the latest events to show
    #[arg(long, default_value_t = 50)]
    pub events: usize,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// NAME, NAME/STEP or NAME@GENERATION; none: everything
    pub names: Vec<String>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct One {
    /// NAME or NAME@GENERATION; without a generation the newest (pin), or all (unpin)
    pub name: String,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// NAME or NAME@GENERATION
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Also what is pinned, or the only good generation
    #[arg(long)]
    pub force: bool,
    /// Take the lock although its holder is not proved to have ended
    #[arg(long)]
    pub steal_lock: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Prune {
    /// NAME; none: every name that is not in use
    pub names: Vec<String>,
    /// Good generations to keep of each [default: the configuration's `keep`]
    #[arg(long)]
    pub keep: Option<u32>,
    /// Also every generation of computations that have completed
    #[arg(long)]
    pub completed: bool,
    /// Take the lock although its holder is not proved to have ended
    #[arg(long)]
    pub steal_lock: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Clone {
    /// NAME, NAME/STEP or NAME@GENERATION; without a generation the newest good one of the name and
    /// of each of its steps
    pub name: String,
    /// The new NAME; NEW@GENERATION chooses the generation as well
    pub new: String,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Export {
    /// NAME, NAME/STEP or NAME@GENERATION; without a generation the newest good one
    pub name: String,
    /// The file to write, `-` for standard output
    pub file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Import {
    /// The file to read, `-` for standard input
    pub file: PathBuf,
    /// The NAME or NAME/STEP to import to [default: the one it was saved under]
    #[arg(long)]
    pub name: Option<String>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct ImportApptainer {
    /// Apptainer's name of the checkpoint, which is its NAME here as well
    pub name: String,
    /// The container image that it was started from
    pub image: PathBuf,
    /// A directory with process images of DMTCP, in place of Apptainer's for NAME
    #[arg(long)]
    pub from: Option<PathBuf>,
    /// Where the DMTCP came from: injected (a node), or contained (the image, with --from the default)
    #[arg(long, value_parser = take_over::placement)]
    pub placement: Option<Placement>,
    #[command(flatten)]
    pub common: Common,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Store(#[from] Error),
    #[error("{0}")]
    Other(String),
    /// All is said; only the code is left to give.
    #[error("")]
    Code(u8),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Store(Error::Name(_)) => USAGE,
            Failure::Store(Error::Absent(_)) => ABSENT,
            Failure::Store(Error::Damaged { .. }) => DAMAGED,
            Failure::Store(Error::Locked(_) | Error::LockLost { .. }) => HELD,
            Failure::Store(_) | Failure::Other(_) => FAILED,
            Failure::Code(code) => *code,
        }
    }
}

impl From<store::LockError> for Failure {
    fn from(error: store::LockError) -> Failure {
        Failure::Store(error.into())
    }
}

/// Does a command; what is returned is the program's exit code.
pub fn run(command: &Command, context: &Context<'_>) -> u8 {
    let done = match command {
        Command::List(list) if list.all_users => look::list_all_users(list, context),
        // Root works on another user's store as that user: nothing in it can lead root astray, and
        // nothing in it gets to belong to root.
        _ => users::become_owner(context.store).and_then(|()| match command {
            Command::Create(create) => create::create(create, context),
            Command::List(list) => look::list(list, context),
            Command::Show(show) => look::show(show, context),
            Command::Verify(verify) => change::verify(verify, context),
            Command::Pin(one) => change::pin(one, context),
            Command::Unpin(one) => change::unpin(one, context),
            Command::Delete(delete) => change::delete(delete, context),
            Command::Prune(prune) => change::prune(prune, context),
            Command::Clone(clone) => change::clone(clone, context),
            Command::Export(export) => transfer::export(export, context),
            Command::Import(import) => transfer::import(import, context),
            Command::ImportApptainer(import) => take_over::take_over(import, context),
        }),
    };
    match done {
        Ok(()) => OK,
        Err(failure) => {
            if !matches!(failure, Failure::Code(_)) {
                log::error!("{failure}");
            }
            failure.code()
        }
    }
}

/// What a user names: `NAME[/STEP][@GENERATION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    name: Name,
    key: Option<StepKey>,
    generation: Option<u64>,
}

impl Target {
    pub fn parse(text: &str) -> Result<Target, Failure> {
        let (path, generation) = match text.split_once('@') {
            None => (text, None),
            Some((path, number)) => {
                let number = number
                    .parse()
                    .ok()
                    .filter(|number| *number > 0)
                    .ok_or_else(|| {
                        Failure::Usage(format!(
                            "`{text}`: after the @ comes the number of a generation, such as 7"
                        ))
                    })?;
                (path, Some(number))
            }
        };
        let (name, key) = match path.split_once('/') {
            None => (path, None),
            Some((name, key)) => (name, Some(StepKey::parse(key)?)),
        };
        Ok(Target {
            name: Name::parse(name)?,
            key,
            generation,
        })
    }

    /// The NAME, of a target that is a whole one.
    pub fn name(&self) -> Result<Name, Failure> {
        match &self.key {
            None => Ok(self.name.clone()),
            Some(key) => Err(Failure::Usage(format!(
                "{}/{key} is a step: what begins from it needs a name of its own",
                self.name
            ))),
        }
    }

    /// The generation that is named, or else the newest one that is good.
    pub fn generation(&self, store: &Store) -> Result<store::Generation, Failure> {
        let cell = self.cell(store)?;
        readable(&cell, entry(&cell, self.generation)?)
    }

    /// The cell, which has to exist.
    fn cell(&self, store: &Store) -> Result<Cell, Failure> {
        let cell = store.name(&self.name);
        let cell = match &self.key {
            None => cell,
            Some(key) => cell.step(key),
        };
        if !cell.exists() {
            return Err(Error::Absent(format!(
                "checkpoint {} in {}",
                cell.label(),
                store.dir().display()
            ))
            .into());
        }
        cell.check()?;
        Ok(cell)
    }

    /// The cell and, unless a key or a generation narrows it down, those of its steps.
    fn cells(&self, store: &Store) -> Result<Vec<Cell>, Failure> {
        let cell = self.cell(store)?;
        let steps = if self.key.is_none() && self.generation.is_none() {
            cell.steps()?
        } else {
            Vec::new()
        };
        Ok(std::iter::once(cell).chain(steps).collect())
    }
}

/// Warns of a generation that may not restart under its new name: DMTCP keeps the absolute paths of
/// its copies of files (seen with 4.1.1: "Unable to find checkpointed copy of file"). In a container
/// they are the same for every name, on the bare host they are below the name's directory.
fn warn_of_paths(manifest: &Manifest, label: &str) {
    if manifest.engine == Kind::Dmtcp && manifest.image.is_none() {
        log::warn!(
            "{label} was saved without a container: if DMTCP had to copy open files, it looks for \
             the copies in the directory of the name and store it was saved in, and a restart \
             from anywhere else fails"
        );
    }
}

/// The store, which need not exist: then it has no names.
fn existing(context: &Context<'_>) -> Result<Option<Store>, Failure> {
    Ok(Store::existing(context.store)?)
}

/// The store that has to exist since something is named in it.
fn store_with(context: &Context<'_>, name: &str) -> Result<Store, Failure> {
    existing(context)?.ok_or_else(|| {
        Error::Absent(format!(
            "checkpoint {name}: there is no store {}",
            context.store.display()
        ))
        .into()
    })
}

/// The entry of generation `number`, or of the newest that is not marked bad and can be read.
fn entry(cell: &Cell, number: Option<u64>) -> Result<Entry, Failure> {
    let mut entries = cell.entries()?;
    let position = match number {
        Some(number) => entries.iter().position(|entry| entry.number == number),
        None => entries
            .iter()
            .rposition(|entry| entry.bad.is_none() && entry.generation.is_ok()),
    };
    match position {
        Some(position) => Ok(entries.swap_remove(position)),
        None => Err(Error::Absent(match number {
            Some(number) => format!("generation {number} of {}", cell.label()),
            None => match cell.steps()?.first().filter(|_| cell.key().is_none()) {
                Some(step) => format!(
                    "good generation of {name} itself, only of its steps (`container-checkpoint \
                     list {name}`): name one, such as {step}",
                    name = cell.label(),
                    step = step.label()
                ),
                None => format!("good generation of {}", cell.label()),
            },
        })
        .into()),
    }
}

/// The generation of an entry, if its manifest can be read.
fn readable(cell: &Cell, entry: Entry) -> Result<store::Generation, Failure> {
    match entry.generation {
        Ok(generation) => Ok(generation),
        Err(fault) => Err(Error::Damaged {
            path: cell
                .dir()
                .join("generations")
                .join(format!("{:06}", entry.number)),
            why: fault.reason().into(),
        }
        .into()),
    }
}

#[cfg(test)]
mod tests;
