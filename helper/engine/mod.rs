//! Engines: what saves and restores processes.
//!
//! Contract: an [`Engine`] starts an application in a [`Place`], fresh or from a generation, and
//! hands back a [`Running`]. It never writes into a committed generation. A checkpoint counts as
//! taken only when the engine says so *and* every file it should have written is there, whole and
//! checked; an engine that is silent past its time limit has failed. A failed checkpoint leaves the
//! application running where the engine can do that, and says so where it cannot.
//!
//! Engines know nothing of Slurm, of policy or of the store's layout: they get directories.

pub mod criu;
pub mod dmtcp;
pub mod known;
pub mod processes;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use self::processes::Process;
use crate::container::{Place, inspect};

/// The name of an engine, as in options, manifests and messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Dmtcp,
    Criu,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Kind::Dmtcp => "dmtcp",
            Kind::Criu => "criu",
        })
    }
}

/// Where DMTCP comes from, as in options and manifests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// This node; it is bound into the container.
    Injected,
    /// The container image.
    Contained,
}

impl std::fmt::Display for Placement {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Placement::Injected => "injected",
            Placement::Contained => "contained",
        })
    }
}

/// Which rank of how many this helper serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    pub rank: u32,
    pub count: u32,
    /// Whether all ranks are on this node.
    pub one_node: bool,
}

/// What an engine needs to start an application.
#[derive(Debug, Clone)]
pub struct Start {
    pub place: Place,
    /// The application's command line as seen in the place. Not empty.
    pub command: Vec<OsString>,
    /// The command to look at to learn what has to be held: the same, or a script's interpreter
    /// where the script can only be seen once `work` is bound.
    pub probe: Vec<OsString>,
    /// Variables that the application sees besides those it inherits.
    pub env: Vec<(OsString, OsString)>,
    /// The host directory of our programs (see `runtime`), bound at [`crate::container::INSIDE`].
    pub runtime: PathBuf,
    /// An empty directory of this run and rank, 0700, on the store's file system; the engine may
    /// do there what it wants. Bound at [`crate::container::INSIDE_WORK`].
    pub work: PathBuf,
    /// This rank's directory in a committed generation to restart from. Read only.
    pub from: Option<PathBuf>,
    pub ranks: Ranks,
}

/// What becomes of the application once it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It goes on.
    Continue,
    /// It is ended at the saved state: nothing it does after that state is seen by anybody.
    Stop,
}

/// How an application ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Exit(i32),
    Signal(i32),
}

/// Why a checkpoint was not taken.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The application is as it was.
    #[error("{0}")]
    Alive(String),
    /// It, all of it, ended with code 0 before anything was done to it.
    #[error("{0}")]
    Ended(String),
    /// The engine ended the application, or left it in a state in which it has to be ended.
    #[error("{0}")]
    Lost(String),
}

/// Why an application was not started. The text says what is wrong and then, behind the last `; `,
/// what the user can do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The engine cannot hold this program in this place; another engine may.
    #[error("{0}")]
    Unable(String),
    /// The engine, or something it needs, is not there.
    #[error("{0}")]
    Missing(String),
    #[error("{0}")]
    Failed(String),
}

/// Refuses a shell into which somebody types. Restored, it would find itself in the background of a
/// terminal that it does not know, take that for the end of its input, and end as if all were done
/// (bash 5.2 under DMTCP 4.1.1).
fn refuse_typed(command: &[OsString]) -> Result<(), StartError> {
    let typed = std::io::stdin().is_terminal() && inspect::reads_commands(command);
    match typed {
        false => Ok(()),
        true => Err(StartError::Unable(
            "a shell into which somebody types cannot go on, since a restart has another terminal; let \
             it read its commands from a file or a script (`< FILE`), or leave the checkpoint option out"
                .into(),
        )),
    }
}

/// An engine that was found on this node.
pub trait Engine: Send + Sync {
    fn kind(&self) -> Kind;

    /// The version, as the engine's own program prints it, e.g. `4.1.1`. Empty as long as it is not
    /// known: that of DMTCP in a container image is, once it has been looked at.
    fn version(&self) -> &str;

    /// Where the engine comes from, for those of which there may be several, once that is decided.
    fn placement(&self) -> Option<Placement> {
        None
    }

    /// Decides that: a generation is restarted by what saved it.
    fn restrict(&self, _placement: Placement) -> Result<(), StartError> {
        Ok(())
    }

    /// Whether `command` can be held in `place`, looked up by running a probe in it where needed.
    /// `runtime` is the host directory of our programs. What is known to speak against it all the same
    /// is returned, as far as it was seen on the way.
    fn can_hold(
        &self,
        place: &Place,
        command: &[OsString],
        runtime: &Path,
    ) -> Result<Vec<known::Doubt>, StartError>;

    /// Starts or restarts the application. For a restart this returns only once the application
    /// runs again, or with an error if it never did (within `limit`).
    fn start(&self, start: &Start, limit: Duration) -> Result<Arc<dyn Running>, StartError>;

    /// Checks a rank's files of a checkpoint, whole and of one set, reading all of them. Used after
    /// a checkpoint and before a restart.
    fn verify(&self, files: &Path) -> Result<(), String>;

    /// The regular files that the application was writing when a rank was saved into `files`, as it
    /// sees them, with their sizes in bytes then; as far as the engine records them. A restart cuts
    /// longer ones back.
    fn written(&self, _files: &Path) -> Result<Vec<(PathBuf, u64)>, String> {
        Ok(Vec::new())
    }
}

/// A running application.
pub trait Running: Send + Sync {
    /// The child of this process whose end is the application's. Only `supervise` reaps it.
    fn child(&self) -> Pid;

    /// Passes a signal on to the application.
    fn signal(&self, signal: Signal);

    /// Saves the application into `into`, an existing empty directory on the store's file system,
    /// one directory per rank: `into/rank-0`, `into/rank-1`… Files are in place and verified when
    /// this returns; they are not yet synced. Called from a thread of its own, one at a time;
    /// only rank 0's `Running` is asked.
    ///
    /// `at_rest` is called once while every process is held at the state that is saved, and all that
    /// they wrote to files and to the job's output is there. Nothing waits longer for it than it
    /// takes. It may not be called where the checkpoint fails.
    fn checkpoint(
        &self,
        into: &Path,
        then: Then,
        limit: Duration,
        at_rest: &dyn Fn(),
    ) -> Result<(), CheckpointError>;

    /// The application's processes on this node, as far as they can be seen; not what serves their
    /// container.
    fn processes(&self) -> Vec<Process>;

    /// Their resident memory in bytes.
    fn memory(&self) -> u64 {
        processes::resident(&self.processes())
    }

    /// How often the application itself wishes to be saved, where it said so by the engine's own
    /// means; and what becomes readable when that has changed.
    fn wish(&self) -> Option<Duration> {
        None
    }

    fn wishes(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What the end of [`Running::child`] says of the application. Called once, after it was
    /// reaped; flushes streams that the engine carries and ends what the engine started.
    fn ended(&self, status: nix::sys::wait::WaitStatus) -> End;

    /// Whether that end was not the application's own but came from the engine's, and how. Asked
    /// after [`Running::ended`].
    fn lost(&self, _status: nix::sys::wait::WaitStatus) -> Option<String> {
        None
    }

    /// Ends the application and all that the engine started, at once.
    fn kill(&self);
}
