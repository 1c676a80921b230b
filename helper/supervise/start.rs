//! From a locked NAME to a running application: which generation, which engine, restart or launch.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::output::Output;
use super::ranks::Leader;
use super::{Computation, Fatal, note, outside, system};
use crate::config::{OnNoGeneration, Preflight};
use crate::engine::known::{self, Doubt};
use crate::engine::{Engine, Kind, Placement, Running, Start, StartError};
use crate::socket::{self, Socket};
use crate::store::{Found, Generation, Lock, Manifest, What, fingerprint};
use crate::streams::Streams;

/// A started application.
pub struct Started {
    pub engine: Arc<dyn Engine>,
    pub running: Arc<dyn Running>,
    /// The generation it was restarted from.
    pub from: Option<Generation>,
    /// By which it may ask.
    pub socket: Socket,
}

/// How a computation begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// From the newest good generation, else from the beginning.
    Auto,
    /// From the beginning, whatever there is.
    Fresh,
    /// From the newest good generation, or not at all.
    Require,
    /// As `Require`, and whatever the fingerprint says.
    Force,
}

impl std::str::FromStr for Restart {
    type Err = String;

    fn from_str(word: &str) -> Result<Restart, String> {
        match word {
            "auto" => Ok(Restart::Auto),
            "fresh" => Ok(Restart::Fresh),
            "require" => Ok(Restart::Require),
            "force" => Ok(Restart::Force),
            _ => Err(format!(
                "`{word}` is none of {}",
                crate::words::RESTARTS.join(", ")
            )),
        }
    }
}

/// Starts the application: from the newest generation that is good and can be restarted here, or
/// from its beginning. Generations that prove bad are marked so and never used again. Once `told` is
/// set nothing more is started.
pub fn start(
    computation: &Computation,
    lock: &Lock,
    leader: &mut Leader,
    restart: Restart,
    told: &AtomicBool,
    output: Option<&Output>,
) -> Result<Started, Fatal> {
    let restart = match anew(computation, restart, told)? {
        Some(why) => {
            log::warn!("{} begins anew: {why}", computation.title);
            Restart::Fresh
        }
        None => restart,
    };
    if restart == Restart::Fresh {
        lock.start_fresh()?;
        return launch(computation, lock, leader, told, output);
    }
    let mut rejected = Vec::new();
    loop {
        let Found {
            generation,
            rejected: bad,
        } = newest_good(computation, lock)?;
        for (number, why) in bad {
            log::warn!("generation {number} of {} is bad: {why}", computation.title);
            rejected.push(number);
        }
        let Some(generation) = generation else { break };
        match resume(
            computation,
            lock,
            leader,
            &generation,
            restart == Restart::Force,
            told,
            output,
        ) {
            Ok(started) => return Ok(started),
            // Its failure is no fault of the generation's.
            Err(why @ Fatal::Restart(_)) if told.load(Ordering::SeqCst) => return Err(why),
            Err(Fatal::Restart(why)) => {
                log::warn!(
                    "generation {} of {} could not be restarted: {why}",
                    generation.number(),
                    computation.title
                );
                note(
                    lock,
                    What::RestartFailed {
                        generation: generation.number(),
                        reason: why.clone(),
                    },
                );
                lock.mark_bad(&generation, &why)?;
                rejected.push(generation.number());
            }
            Err(other) => return Err(other),
        }
    }
    let none_left = match (restart, rejected.is_empty()) {
        (Restart::Require | Restart::Force, true) => Some("there is no saved state".to_owned()),
        (_, false) if computation.config.on_no_generation == OnNoGeneration::Fail => {
            Some(format!("no good generation is left (bad: {rejected:?})"))
        }
        (Restart::Require | Restart::Force, false) => Some("no good generation is left".into()),
        _ => None,
    };
    match none_left {
        Some(why) => Err(Fatal::Refused(format!(
            "{}: {why}. To begin anew, use --container-checkpoint-restart=fresh",
            computation.title
        ))),
        None => launch(computation, lock, leader, told, output),
    }
}

/// Why a stage cannot go on from its newest generation because of its streams. A step whose input is
/// another one is not begun anew for that: it may have worked for weeks, and the input may be a mistake.
fn anew(
    computation: &Computation,
    restart: Restart,
    told: &AtomicBool,
) -> Result<Option<String>, Fatal> {
    let newest = computation.cell.numbers()?.last().copied();
    let (Some(streams), Some(newest)) = (&computation.streams, newest) else {
        return Ok(None);
    };
    if restart == Restart::Fresh || newest <= computation.cell.floor()? {
        return Ok(None);
    }
    let generation = computation.cell.generation(newest)?;
    if is_from_elsewhere(computation, streams, &generation) {
        return Ok(None);
    }
    let answer = streams.can_go_on(newest, told);
    match answer.map_err(system("the standard streams"))? {
        Ok(()) => Ok(None),
        Err(why) if streams.are_all() => Ok(Some(why)),
        Err(why) if restart == Restart::Force => {
            log::warn!("{} goes on in spite of this: {why}", computation.title);
            Ok(None)
        }
        Err(why) => Err(Fatal::Refused(format!(
            "generation {newest} of {} cannot go on: {why}. Give it the same input as before; to \
             begin anew, use --container-checkpoint-restart=fresh; =force goes on with the input from \
             its beginning",
            computation.title
        ))),
    }
}

/// Whether what was read and written before `generation` has no place in these streams: nothing was
/// noted of it, or a stage with a name of its own goes on from what was saved outside of this script.
fn is_from_elsewhere(
    computation: &Computation,
    streams: &Streams,
    generation: &Generation,
) -> bool {
    let unknown = !streams.knows(generation.number());
    if !streams.are_all() {
        return unknown;
    }
    let other = generation.manifest().job != computation.job.as_ref().map(|job| job.id);
    let copied = computation.from.is_some() && unknown;
    computation.cell.key().is_none() && (other || copied)
}

fn newest_good(computation: &Computation, lock: &Lock) -> Result<Found, Fatal> {
    Ok(lock.newest_good(true, &|manifest: &Manifest, rank: &Path| {
        match computation
            .engines
            .iter()
            .find(|engine| engine.kind() == manifest.engine)
        {
            Some(engine) => engine.verify(rank),
            // Its checksums are good; whether it can be restarted here is decided next.
            None => Ok(()),
        }
    })?)
}

/// Restarts from `generation`. [`Fatal::Restart`] says that the generation itself is to blame.
fn resume(
    computation: &Computation,
    lock: &Lock,
    leader: &mut Leader,
    generation: &Generation,
    force: bool,
    told: &AtomicBool,
    output: Option<&Output>,
) -> Result<Started, Fatal> {
    if let Some(streams) = &computation.streams {
        let elsewhere = is_from_elsewhere(computation, streams, generation);
        let started = streams.start((!elsewhere).then_some(generation.number()));
        started.map_err(|why| match streams.are_all() {
            true => Fatal::Restart(format!("its streams cannot go on: {why}")),
            // That is no fault of the generation's.
            false => Fatal::Refused(format!(
                "{}: its standard input cannot go on: {why}",
                computation.title
            )),
        })?;
    }
    let manifest = generation.manifest();
    let engine = computation
        .engines
        .iter()
        .find(|engine| engine.kind() == manifest.engine)
        .ok_or_else(|| {
            Fatal::Refused(format!(
                "generation {} of {} was saved by {engine}, which cannot be used here: {}. Use \
                 --container-checkpoint-engine={engine} on a node that has it; to begin anew, use \
                 --container-checkpoint-restart=fresh",
                generation.number(),
                computation.title,
                computation.missing_text(),
                engine = manifest.engine
            ))
        })?;
    let refused = |why: StartError| {
        Fatal::Refused(format!(
            "generation {} of {} cannot go on here: {why}",
            generation.number(),
            computation.title
        ))
    };
    if let Some(placement) = placement(generation) {
        engine.restrict(placement).map_err(&refused)?;
    }
    let mismatches =
        fingerprint::compare(manifest, &computation.present(engine.as_ref(), manifest));
    if !mismatches.is_empty() {
        let text: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
        let text = text.join("; ");
        if !force {
            return Err(Fatal::Refused(format!(
                "generation {} of {} cannot go on here: {text}. To try all the same, use \
                 --container-checkpoint-restart=force; to begin anew, =fresh",
                generation.number(),
                computation.title,
            )));
        }
        log::warn!("restarting in spite of this: {text}");
    }
    if manifest.engine == Kind::Dmtcp {
        // A command or image that does not fit is no fault of the generation's.
        let (place, command) = (&computation.place, computation.probe_command());
        engine
            .can_hold(place, &command, computation.runtime.dir())
            .map_err(&refused)?;
    }
    let missing = outside::missing(manifest, &|| !told.load(Ordering::SeqCst));
    if !missing.is_empty() && !told.load(Ordering::SeqCst) {
        let text = missing.join("; ");
        if !force {
            return Err(Fatal::Refused(format!(
                "generation {} of {} cannot go on here: {text}. Put back what is missing, as it was; \
                 or begin from another generation (container-checkpoint run --from NAME@N), or anew \
                 (--container-checkpoint-restart=fresh); =force tries all the same",
                generation.number(),
                computation.title,
            )));
        }
        log::warn!("restarting in spite of this: {text}");
    }
    if let Some(output) = output {
        output.cut_back(generation.number(), &manifest.streams);
    }
    begin(computation, lock, leader, engine, Some(generation), told).map_err(|why| match why {
        StartError::Failed(why) => Fatal::Restart(why),
        StartError::Unable(why) | StartError::Missing(why) => Fatal::Refused(why),
    })
}

/// Starts the application from its beginning under the first engine that can hold it.
fn launch(
    computation: &Computation,
    lock: &Lock,
    leader: &mut Leader,
    told: &AtomicBool,
    output: Option<&Output>,
) -> Result<Started, Fatal> {
    if let Some(output) = output {
        output.cut_back(0, &[]);
    }
    let mut reasons = computation.missing.clone();
    for engine in &computation.engines {
        let held = engine.can_hold(
            &computation.place,
            &computation.probe_command(),
            computation.runtime.dir(),
        );
        let held = match held {
            Ok(doubts) => {
                preflight(computation, &doubts)?;
                if let Some(streams) = &computation.streams {
                    let started = streams.start(None);
                    started.map_err(|why| {
                        Fatal::Start(format!("its streams cannot begin anew: {why}"))
                    })?;
                }
                Ok(())
            }
            Err(why) => Err(why),
        };
        match held.and_then(|()| begin(computation, lock, leader, engine, None, told)) {
            Ok(started) => return Ok(started),
            Err(StartError::Unable(why) | StartError::Missing(why)) => {
                reasons.push(format!("{}: {why}", engine.kind()));
            }
            Err(StartError::Failed(why)) => return Err(Fatal::Start(why)),
        }
    }
    Err(Fatal::Unavailable(reasons.join("; ")))
}

/// Tells of what the application's checkpoints will probably not survive, or refuses to start it, as
/// the site has decided.
fn preflight(computation: &Computation, doubts: &[Doubt]) -> Result<(), Fatal> {
    let gpu = computation.gpu.as_deref().map(known::gpu);
    for doubt in gpu.iter().chain(doubts) {
        match computation.config.preflight {
            Preflight::Off => {}
            Preflight::Warn => log::warn!("this application may not be saved: {doubt}"),
            Preflight::Fail => {
                return Err(Fatal::Refused(format!(
                    "{}: not started, as this site wants such jobs refused (`preflight: fail` in the \
                     configuration): {doubt}",
                    computation.title
                )));
            }
        }
    }
    Ok(())
}

fn begin(
    computation: &Computation,
    lock: &Lock,
    leader: &mut Leader,
    engine: &Arc<dyn Engine>,
    from: Option<&Generation>,
    told: &AtomicBool,
) -> Result<Started, StartError> {
    if told.load(Ordering::SeqCst) {
        return Err(failed("it was told to end"));
    }
    let rank = computation.ranks.rank;
    let work = lock.work_dir(rank).map_err(failed)?;
    let start = order(computation, work, from)?;
    let paths = socket::Paths::on_host(
        &computation.place,
        computation.cell.dir(),
        &start.work,
        rank,
    );
    let socket = Socket::open(
        &paths.socket,
        computation.config.hold_limit,
        from.map(Generation::number),
    );
    leader
        .start(engine.kind(), from.map(Generation::number))
        .map_err(|why| failed(format!("cannot leave word for the other ranks: {why}")))?;
    let running = engine.start(&start, limit(computation))?;
    Ok(Started {
        engine: engine.clone(),
        running,
        from: from.cloned(),
        socket,
    })
}

/// Starts the application of a rank other than 0, as rank 0 says, in its own directory of `work`.
pub fn follow(
    computation: &Computation,
    engine: Kind,
    work: &Path,
    from: Option<&Generation>,
) -> Result<Arc<dyn Running>, StartError> {
    let engine = computation
        .engines
        .iter()
        .find(|found| found.kind() == engine)
        .ok_or_else(|| {
            StartError::Missing(format!(
                "{engine}, which rank 0 uses, cannot be used here: {}",
                computation.missing_text()
            ))
        })?;
    if let Some(placement) = from.and_then(placement) {
        engine.restrict(placement)?;
    }
    let work = work.join(format!("rank-{}", computation.ranks.rank));
    let made = std::fs::remove_dir_all(&work)
        .or_else(|why| match why.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(why),
        })
        .and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(&work));
    made.map_err(|why| failed(format!("cannot make {}: {why}", work.display())))?;
    engine.start(&order(computation, work, from)?, limit(computation))
}

/// Where the DMTCP of a generation came from; nothing for other engines.
fn placement(generation: &Generation) -> Option<Placement> {
    let manifest = generation.manifest();
    let injected = || Placement::Injected;
    (manifest.engine == Kind::Dmtcp).then(|| manifest.placement.unwrap_or_else(injected))
}

fn failed(why: impl std::fmt::Display) -> StartError {
    StartError::Failed(why.to_string())
}

/// What an engine is told of this rank, whose directory is `work`.
fn order(
    computation: &Computation,
    work: PathBuf,
    from: Option<&Generation>,
) -> Result<Start, StartError> {
    let mut command = computation.command.clone();
    if let Some(script) = &computation.script {
        // bash keeps its script open: the copy is at the same path in every run, on every node.
        let copy = work.join(super::SCRIPT);
        std::fs::copy(script, &copy)
            .map_err(|why| failed(format!("cannot copy {}: {why}", script.display())))?;
        command[0] = OsString::from(computation.place.work(&work).join(super::SCRIPT));
    }
    let rank = computation.ranks.rank;
    let cell = computation.cell.dir();
    let paths = socket::Paths::on_host(&computation.place, cell, &work, rank);
    if let Err(why) = socket::environment::write(&paths.environment) {
        log::warn!("cannot write {}: {why}", paths.environment.display());
    }
    let runtime = computation.runtime.dir();
    let env = socket::variables(&computation.place, cell, rank, runtime);
    Ok(Start {
        place: computation.place.clone(),
        command,
        probe: computation.probe_command(),
        env: env.map(|(name, path)| (name.into(), path.into())).into(),
        runtime: runtime.to_path_buf(),
        work,
        from: from.map(|from| from.rank_dir(rank)),
        ranks: computation.ranks.clone(),
    })
}

fn limit(computation: &Computation) -> Duration {
    computation.config.restart_timeout
}
