//! Findings about the program and the engines that are to save it.

use std::ffi::OsString;
use std::sync::Arc;

use super::state::Last;
use super::{Findings, Level, Of};
use crate::config::{Config, EngineChoice};
use crate::container::Place;
use crate::container::inspect::{self, Facts};
use crate::container::shell_action::{self, Shell};
use crate::engine::known::{self, Doubt};
use crate::engine::{Engine, Kind, Placement, StartError, dmtcp};
use crate::runtime::Runtime;
use crate::store::fingerprint;
use crate::store::{Manifest, Store};
use crate::supervise;
use crate::task;

use Level::{Problem, Warning};

/// What decides which engines are looked at, and how far.
pub struct Asked<'a> {
    pub config: &'a Config,
    pub wanted: EngineChoice,
    /// Where DMTCP has to come from, if anywhere.
    pub placement: Option<Placement>,
    /// Of `apptainer shell`: the command is found out inside.
    pub shell: Option<&'a Shell>,
    /// Whether this is no node of the job's.
    pub submission: bool,
}

/// Program and engines: what a job would try, in its order.
pub fn look(
    asked: &Asked,
    place: &Place,
    command: &[OsString],
    store: &Store,
    last: &Last,
    found: &mut Findings,
) {
    let (engines, missing, runtime) =
        match task::engines(asked.config, store.dir(), asked.wanted, asked.placement) {
            Ok(found) => found,
            Err(why) => {
                let cure = "choose another directory as the store (--container-checkpoint-dir)";
                return found.told(Problem, Of::Job, "store", &format!("{why:#}"), cure);
            }
        };
    if let Some(saved) = &last.goes_on {
        restart(saved, place, &engines, found);
    }
    let mut place = place.clone();
    let command = match asked.shell {
        None => command.to_vec(),
        Some(shell) => match shell_action::settle(shell, &mut place, runtime.dir()) {
            Ok(command) => command,
            Err(why) => {
                let cure = "try it without checkpoints: apptainer shell IMAGE";
                return found.told(Problem, Of::Job, "program", &why.to_string(), cure);
            }
        },
    };
    let (place, command) = (&place, command.as_slice());
    let Ok(facts) = program(place, command, &runtime, found) else {
        return;
    };
    let explicit = asked.wanted != EngineChoice::Auto;
    let mut taken = None;
    let mut seen = None;
    let mut refused = Vec::new();
    for engine in &engines {
        let (kind, version) = (engine.kind(), engine.version());
        let untried = match (taken, kind) {
            (Some(taken), _) => Some(format!("not tried, as {taken} is taken")),
            (None, Kind::Dmtcp) if command.is_empty() => {
                Some("installed; give a command to see whether it can be held".into())
            }
            // It is the job's node that counts.
            (None, Kind::Criu) if asked.submission => Some("installed here".into()),
            _ => None,
        };
        if let Some(text) = untried {
            taken = taken.or(Some(kind));
            found.ok(Of::Node, "engine", format!("{kind} {version}: {text}"));
            continue;
        }
        match engine.can_hold(place, command, runtime.dir()) {
            Ok(doubts) => {
                taken = Some(kind);
                seen = (kind == Kind::Dmtcp).then_some(doubts);
                // That of a container image is known only now.
                let text = format!("{kind} {} can hold it", engine.version());
                found.ok(Of::Node, "engine", text);
            }
            Err(why) => refused.push(why),
        }
    }
    for why in refused {
        let of = match why {
            StartError::Unable(_) if explicit => Of::Job,
            _ => Of::Node,
        };
        let text = why.to_string();
        if taken.is_some() {
            found.ok(of, "engine", format!("not taken: {text}"));
        } else {
            let cure = "see what the engine needs in the documentation (engines.md)";
            found.told(Problem, of, "engine", &text, cure);
        }
    }
    for text in &missing {
        // `dmtcp: DMTCP is not installed…`
        let (_, text) = text.split_once(": ").unwrap_or(("", text));
        if taken.is_some() {
            found.ok(Of::Node, "engine", format!("not taken: {text}"));
        } else {
            found.told(Problem, Of::Node, "engine", text, "install it on the nodes");
        }
    }
    if let (Some(facts), Some(kind)) = (facts, taken) {
        // What is not tried out has not looked at the program.
        let doubts = seen.unwrap_or_else(|| known::doubts(kind, &facts.libraries));
        libraries(kind, doubts, &facts, found);
    }
}

/// What the program is. `Err`: it cannot be run, or not looked at.
fn program(
    place: &Place,
    command: &[OsString],
    runtime: &Runtime,
    found: &mut Findings,
) -> Result<Option<Facts>, ()> {
    if command.is_empty() {
        found.ok(Of::Job, "program", "not looked at: no command was given");
        return Ok(None);
    }
    let facts = match inspect::inspect(place, command, runtime.dir(), &[]) {
        Ok(facts) => facts,
        Err(why) => {
            let cure = "try it without checkpoints: apptainer exec IMAGE COMMAND";
            found.add(Problem, Of::Node, "program", why.to_string(), cure);
            return Err(());
        }
    };
    // What cannot be run at all has the same words from every engine.
    if let Err(why @ StartError::Failed(_)) = dmtcp::holdable(command, &facts) {
        let cure = "check the command and the container image";
        found.told(Problem, Of::Job, "program", &why.to_string(), cure);
        return Err(());
    }
    found.ok(Of::Job, "program", describe(command, &facts));
    Ok(Some(facts))
}

/// `python3 (/usr/bin/python3): dynamic, glibc 2.36`.
fn describe(command: &[OsString], facts: &Facts) -> String {
    let name = command.first().map(|word| word.to_string_lossy());
    let path = facts.interpreters.last().or(facts.program.as_ref());
    let path = path.map_or("?".into(), |path| path.display().to_string());
    let kind = match &facts.kind {
        inspect::Kind::Dynamic {
            glibc: Some((major, minor)),
            ..
        } => format!("dynamic, glibc {major}.{minor}"),
        inspect::Kind::Dynamic { glibc: None, .. } => "dynamic, another libc than glibc".into(),
        inspect::Kind::Musl => "dynamic, musl".into(),
        inspect::Kind::Static if facts.go => "static, made by Go".into(),
        _ => "static".into(),
    };
    let setuid = if facts.setuid { ", setuid" } else { "" };
    let name = match name.unwrap_or_default() {
        name if name == path => path,
        name => format!("{name} ({path})"),
    };
    format!("{name}: {kind}{setuid}")
}

/// What the program's libraries tell of things that the engine cannot save.
fn libraries(engine: Kind, doubts: Vec<Doubt>, facts: &Facts, found: &mut Findings) {
    if facts.setuid && engine == Kind::Criu {
        let cause =
            "it is setuid or setgid, and under CRIU it runs without other rights than yours";
        found.add(
            Warning,
            Of::Job,
            "program",
            cause,
            "use a copy without that bit",
        );
    }
    let hwloc = |name: &&String| engine == Kind::Dmtcp && name.starts_with(dmtcp::LIBHWLOC);
    if let Some(hwloc) = facts.libraries.iter().find(hwloc)
        && !doubts.iter().any(|doubt| doubt.cause.contains(hwloc))
    {
        let text = format!("it is linked with {hwloc}, which is provided for");
        found.ok(Of::Job, "libraries", text);
    }
    for Doubt { cause, cure } in doubts {
        found.add(Warning, Of::Job, "libraries", cause, cure);
    }
}

/// Whether what is saved can go on on this node, as far as the node decides that.
fn restart(saved: &Manifest, place: &Place, engines: &[Arc<dyn Engine>], found: &mut Findings) {
    let Some(engine) = engines.iter().find(|engine| engine.kind() == saved.engine) else {
        let cause = format!(
            "the saved state is {}'s, which cannot be used here",
            saved.engine
        );
        let cure = "use the engine that saved it, on nodes that have it, or begin anew with \
                    --container-checkpoint-restart=fresh";
        return found.add(Problem, Of::Node, "restart", cause, cure);
    };
    if saved.engine == Kind::Dmtcp {
        let placement = saved.placement.unwrap_or(Placement::Injected);
        if let Err(why) = engine.restrict(placement) {
            let text = format!("the saved state cannot go on: {why}");
            return found.told(Problem, Of::Node, "restart", &text, "begin anew");
        }
    }
    // Another image is told where images are looked at.
    let image = match (place, &saved.image) {
        (Place::Bare, _) => None,
        (Place::Apptainer(_), Some(image)) => Some(image.digest.clone()),
        (Place::Apptainer(_), None) => Some("a container image".to_owned()),
    };
    let mismatches =
        fingerprint::compare(saved, &supervise::present(engine.as_ref(), saved, image));
    for mismatch in &mismatches {
        let of = match mismatch.field {
            "image" => Of::Job,
            _ => Of::Node,
        };
        let text = format!("the saved state cannot go on: {mismatch}");
        found.told(Problem, of, "restart", &text, "begin anew");
    }
    if mismatches.is_empty() {
        found.ok(Of::Node, "restart", "the saved state can go on here");
    }
}
