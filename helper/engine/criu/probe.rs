//! Whether CRIU works in a place: the only sure way is to try it there.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::wait::waitpid;

use super::running::Application;
use super::streams::Job;
use super::{Criu, agent};
use crate::container::Place;
use crate::engine::{Ranks, Running, Start, StartError, Then};
use crate::runtime::{HELPER, Runtime};

/// How long each part of a probe may take, the start of a container included.
const LIMIT: Duration = Duration::from_secs(60);

/// The kernel's switches for user namespaces, and what they hold when those are off (the second is
/// Debian's own).
const SWITCHES: &[&str] = &[
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/kernel/unprivileged_userns_clone",
];

/// The kernel's switch by which user namespaces are off on this node.
pub fn namespaces_off() -> Option<&'static str> {
    // Without the file there is no such switch.
    let off = |switch: &&&str| fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0");
    SWITCHES.iter().find(off).copied()
}

/// Saves a program that does nothing and restores it, each in a container of its own.
pub fn probe(criu: &Criu, place: &Place, runtime: &Path) -> Result<(), StartError> {
    if let Some(switch) = namespaces_off() {
        return Err(StartError::Missing(format!(
            "CRIU needs user namespaces, which are switched off on this node: {switch} is 0"
        )));
    }
    let failed = |what: String| StartError::Failed(format!("cannot try out CRIU: {what}"));
    let scratch = tempfile::Builder::new()
        .prefix("container-checkpoint-")
        .tempdir()
        .map_err(|error| failed(format!("no directory for it: {error}")))?;
    let dir = |name: &str| {
        let path = scratch.path().join(name);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(failed(format!("cannot make {}: {error}", path.display()))),
        }
    };
    let mut command = Runtime::argv(place.programs(runtime), HELPER);
    command.extend([agent::SUBCOMMAND, agent::IDLE].map(OsString::from));
    let mut start = Start {
        place: place.clone(),
        command,
        probe: Vec::new(),
        env: Vec::new(),
        runtime: runtime.into(),
        work: dir("first")?,
        from: None,
        ranks: Ranks {
            rank: 0,
            count: 1,
            one_node: true,
        },
    };
    let nowhere = || Job::nowhere().map_err(|error| failed(error.to_string()));
    let saved = dir("saved")?;
    let running = criu.begin(&start, nowhere()?, LIMIT)?;
    let result = running.checkpoint(&saved, Then::Stop, LIMIT, &|| ());
    end(&running);
    result.map_err(|error| {
        StartError::Unable(format!(
            "CRIU {} cannot save processes here: {error}",
            criu.version
        ))
    })?;

    start.work = dir("second")?;
    start.from = Some(saved.join("rank-0"));
    let running = criu.begin(&start, nowhere()?, LIMIT).map_err(|error| {
        StartError::Unable(format!(
            "CRIU {} cannot restore processes here: {error}",
            criu.version
        ))
    })?;
    end(&running);
    Ok(())
}

fn end(running: &Application) {
    running.kill();
    match waitpid(running.child(), None) {
        Ok(status) => drop(running.ended(status)),
        Err(error) => log::error!("cannot wait for the container that was tried out: {error}"),
    }
}
