//! Where a command runs: inside an Apptainer container, or on the bare host.
//!
//! Contract: a [`Place`] turns what an engine needs inside (binds, flags, variables and the command
//! line) into one command that can be spawned. It knows nothing of engines; it runs nothing itself.

pub mod command_line;
pub mod gpu;
pub mod image;
pub mod inspect;
pub mod installed;
pub mod shell_action;
pub mod sif;
pub mod wrapper;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the helper's own directory of programs is seen inside a container (read-only).
pub const INSIDE: &str = "/.container-checkpoint";

/// Where the working directory of an engine (checkpoint files, sockets) is seen inside a container.
/// It lies below [`INSIDE`], so that a container gets one directory of ours.
pub const INSIDE_WORK: &str = "/.container-checkpoint/work";

/// A directory or file of the host made visible inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub host: PathBuf,
    pub inside: PathBuf,
    pub writable: bool,
}

/// What an engine needs around its command line.
#[derive(Debug, Clone, Default)]
pub struct Inside {
    pub binds: Vec<Bind>,
    /// Flags of `apptainer exec`; ignored on the bare host.
    pub flags: Vec<OsString>,
    /// Variables that the command sees.
    pub env: Vec<(OsString, OsString)>,
    pub argv: Vec<OsString>,
}

/// Where an application runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On the node itself, without a container. [`INSIDE`] does not exist there: an engine uses the
    /// host's paths.
    Bare,
    Apptainer(Apptainer),
}

/// An Apptainer container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Apptainer {
    /// What the user put before the program and becomes it, such as `nice -n 5`.
    pub prefix: Vec<OsString>,
    /// The program, `apptainer` or `singularity`, found in PATH or given in the configuration.
    pub program: PathBuf,
    /// The user's own options before `exec`, such as `--quiet`.
    pub globals: Vec<OsString>,
    /// The user's own options of `apptainer exec`, kept as they are.
    pub options: Vec<OsString>,
    /// The long names of those that are on, as far as they are known; see [`command_line::Line`].
    pub flags: BTreeSet<String>,
    /// A SIF file or a sandbox directory, absolute.
    pub image: PathBuf,
    /// Files that have to be seen inside whatever the engine, such as a batch script.
    pub binds: Vec<Bind>,
    /// Variables for inside, whatever the engine.
    pub variables: Vec<(OsString, OsString)>,
}

impl Place {
    /// The command that runs `inside.argv` here, in a process group of its own unless it may need the
    /// terminal: what is sent to our group (`scancel --full`) it gets from us, and once. The caller
    /// sets streams and working directory.
    pub fn command(&self, inside: &Inside) -> Command {
        let mut command = self.command_in_our_group(inside);
        if !crate::sys::in_foreground() {
            command.process_group(0);
        }
        command
    }

    /// The same in our process group, for what is given a session of its own.
    pub fn command_in_our_group(&self, inside: &Inside) -> Command {
        match self {
            Place::Bare => {
                let mut argv = inside.argv.iter();
                let mut command = Command::new(argv.next().map_or(OsStr::new(""), |a| a));
                command
                    .args(argv)
                    .envs(inside.env.iter().map(|(k, v)| (k, v)));
                command
            }
            Place::Apptainer(apptainer) => {
                let program = OsString::from(&apptainer.program);
                let mut words = apptainer.prefix.iter().chain([&program]);
                let mut command = Command::new(words.next().unwrap_or(&program));
                command
                    .args(words)
                    .args(&apptainer.globals)
                    .arg("exec")
                    .args(&apptainer.options)
                    .args(&inside.flags);
                for bind in apptainer.binds.iter().chain(&inside.binds) {
                    command.arg("--bind").arg(bind.argument());
                }
                // By variable and not by --env: a value may hold commas, and nothing of it has to
                // be seen in a list of processes. The program strips the prefix, also under
                // --cleanenv and --containall.
                for (key, value) in apptainer.variables.iter().chain(&inside.env) {
                    let mut name = OsString::from(apptainer.variable_prefix());
                    name.push(key);
                    command.env(name, value);
                }
                command.arg(&apptainer.image).args(&inside.argv);
                command
            }
        }
    }

    /// The path under which a command here sees our programs, whose host directory is `runtime`.
    pub fn programs<'a>(&self, runtime: &'a Path) -> &'a Path {
        match self {
            Place::Bare => runtime,
            Place::Apptainer(_) => Path::new(INSIDE),
        }
    }

    /// The path under which a command here sees the engine's working directory `work`.
    pub fn work<'a>(&self, work: &'a Path) -> &'a Path {
        match self {
            Place::Bare => work,
            Place::Apptainer(_) => Path::new(INSIDE_WORK),
        }
    }
}

impl Apptainer {
    /// Whether the program is SingularityCE. Apptainer installs `singularity` as a link to itself;
    /// where it is a program of its own, that is the other.
    pub fn is_singularity(&self) -> bool {
        let program = self.program.canonicalize();
        let name = program.as_deref().unwrap_or(&self.program).file_name();
        name.is_some_and(|name| name == "singularity")
    }

    /// What variables for the container begin with on the host.
    fn variable_prefix(&self) -> &'static str {
        match self.is_singularity() {
            true => "SINGULARITYENV_",
            false => "APPTAINERENV_",
        }
    }
}

impl Bind {
    /// The value of `--bind`. Paths with a colon or a comma cannot be written there; callers check.
    fn argument(&self) -> OsString {
        let mut argument = self.host.clone().into_os_string();
        argument.push(":");
        argument.push(&self.inside);
        argument.push(if self.writable { ":rw" } else { ":ro" });
        argument
    }
}
