//! What `apptainer shell` runs.
//!
//! Contract: [`settle`] finds out which shell that is by looking into the container, and gives it as
//! a command for `apptainer exec`; what the program itself would do to its environment goes into the
//! place.
//!
//! The program decides inside (`action_script.sh` of Apptainer 1.2 to 1.5, `action_scripts.go` of
//! SingularityCE 4): the shell of `--shell` or `APPTAINER_SHELL` if that can be run; else /bin/bash,
//! without ~/.bashrc; else /bin/sh. SHELL names one of the last two. Words behind the image are
//! ignored by all of them.

use std::ffi::OsString;
use std::path::Path;

use super::inspect::{self, InspectError};
use super::{Apptainer, Place};

/// The shells that are looked for, with their options.
const SHELLS: [&[&str]; 2] = [&["/bin/bash", "--norc"], &["/bin/sh"]];

/// A shell as a command line asks for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shell {
    /// The value of `--shell` or of its variable. Not empty.
    pub wanted: Option<OsString>,
}

#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error("there is no shell in {}: neither /bin/bash nor /bin/sh; name another one by --shell", .0.display())]
    None(std::path::PathBuf),
}

/// The command that `shell` stands for in `place`. `runtime` is the host directory of our programs.
pub fn settle(
    shell: &Shell,
    place: &mut Place,
    runtime: &Path,
) -> Result<Vec<OsString>, ShellError> {
    let known = || SHELLS.iter().map(|words| OsString::from(words[0]));
    let candidates: Vec<OsString> = shell.wanted.iter().cloned().chain(known()).collect();
    let found = inspect::first_executable(place, runtime, &candidates)?;
    let Place::Apptainer(apptainer) = place else {
        return Ok(candidates);
    };
    let none = || ShellError::None(apptainer.image.clone());
    let found = found.ok_or_else(none)?;
    Ok(command(shell, found, apptainer))
}

/// The command for the candidate of number `found`.
fn command(shell: &Shell, found: usize, apptainer: &mut Apptainer) -> Vec<OsString> {
    match (&shell.wanted, found) {
        (Some(wanted), 0) => vec![wanted.clone()],
        (wanted, found) => {
            let words = SHELLS[found - usize::from(wanted.is_some())];
            apptainer.variables.push(("SHELL".into(), words[0].into()));
            words.iter().map(OsString::from).collect()
        }
    }
}
