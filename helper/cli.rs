//! The command line, and nothing else.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands;
use crate::socket::client::Ask;

/// Keeps containerized applications resumable: checkpoint on pre-emption and at the time limit,
/// go on from the saved state in the next run.
#[derive(Debug, Parser)]
#[command(name = "container-checkpoint", version, arg_required_else_help = true, after_help = commands::EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a container image (or, after `--`, on the host) and keep it resumable
    Run(Run),
    /// From inside an application: ask the helper that keeps it resumable
    ///
    /// Exit codes: 0 done; 1 the checkpoint failed, or the hold was refused or had ended; 2 wrong
    /// command line; 69 no helper answers; 75 a checkpoint is in the way, ask again.
    Inside {
        #[command(subcommand)]
        ask: Ask,
    },
    /// Ask for a checkpoint of a running job, from any node
    Save(commands::save::Save),
    /// Find out beforehand what would keep a job from being saved, and how to cure it
    Check(commands::check::Check),
    /// Save and requeue every job on a node, and drain it (for operators)
    Evacuate(commands::evacuate::Evacuate),
    #[command(flatten)]
    Store(commands::Command),
    /// Stand in front of a task of a Slurm job (used by the plugin)
    #[command(hide = true)]
    Task {
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
#[command(
    override_usage = "container-checkpoint run [OPTIONS] IMAGE [COMMAND...]\n       \
    container-checkpoint run [OPTIONS] -- COMMAND..."
)]
pub struct Run {
    /// The computation's name [default: $CONTAINER_CHECKPOINT]
    #[arg(long)]
    pub name: Option<String>,
    /// What saves and restores: auto, dmtcp or criu
    #[arg(long)]
    pub engine: Option<String>,
    /// Where DMTCP comes from: auto, injected (this node) or contained (the container image)
    #[arg(long)]
    pub placement: Option<String>,
    /// Where to begin: auto, fresh, require or force
    #[arg(long)]
    pub restart: Option<String>,
    /// Begin from this generation, of the same name or of another: NAME[@GENERATION], without a
    /// number the newest. Without --name it is also the name
    #[arg(long, value_name = "NAME@GENERATION")]
    pub from: Option<String>,
    /// The store to use instead of the configured one
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Save every DURATION, `off`, or `auto`
    #[arg(long)]
    pub interval: Option<String>,
    /// The signal that requests a checkpoint
    #[arg(long)]
    pub signal: Option<String>,
    /// The configuration file
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Run the image's %startscript, as `apptainer instance start` does; what follows IMAGE are its
    /// arguments
    #[arg(long, conflicts_with = "runscript")]
    pub startscript: bool,
    /// Run the image's %runscript, as `apptainer run` does; what follows IMAGE are its arguments
    #[arg(long)]
    pub runscript: bool,
    /// Take the name from whoever holds it
    #[arg(long)]
    pub steal_lock: bool,
    /// An option for `apptainer exec`; may be given several times
    #[arg(
        long = "apptainer-option",
        allow_hyphen_values = true,
        value_name = "OPTION"
    )]
    pub apptainer_options: Vec<OsString>,
    /// The container image, then the command
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "IMAGE [COMMAND]"
    )]
    pub words: Vec<OsString>,
}
