//! Findings about a job that is to be submitted.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tempfile::TempDir;

use super::submitted::Submitted;
use super::{Check, Findings, Level, Of, output};
use crate::commands::around;
use crate::config::{Config, EngineChoice};
use crate::container::command_line::{self, Understood};
use crate::container::inspect::{self, Facts};
use crate::container::installed::Installed;
use crate::container::sif;
use crate::container::{Place, gpu, image};
use crate::engine::criu::probe;
use crate::engine::known::{self, Doubt};
use crate::engine::{Kind, Placement, StartError, dmtcp};
use crate::policy::{self, Cost};
use crate::runtime::Runtime;
use crate::slurm::site::{self, Partition, Site};
use crate::slurm::{self, Job, SlurmError};
use crate::store::{Cell, Manifest, Name, Store, bytes_for_people};
use crate::supervise;
use crate::task::{self, Request};
use crate::words::{ENGINE_RULE, NAME_RULE, PLACEMENT_RULE};

use Level::{Problem, Warning};

/// What happens to a job without an image that can be used.
const ANOTHER_IMAGE: &str = "name another image, or copy or build it anew";

/// Looks at everything a job needs.
pub fn look(check: &Check, found: &mut Findings) {
    let request = Request {
        name: check.name.clone(),
        image: check.image.clone(),
        engine: check.engine.clone(),
        config: check.common.config.clone(),
        apptainer_options: check.apptainer_options.clone(),
        ..Request::default()
    };
    let mut request = request.or_else(Request::from_environment());
    let config = match Config::load(request.config.as_deref()) {
        Ok(config) => config,
        Err(why) => {
            let cure =
                "correct the file, or have its administrator do it: jobs fail at their start";
            return found.add(Problem, Of::Job, "config", why.to_string(), cure);
        }
    };
    let submitted = match check.submission {
        Some(_) => Submitted::by_parent(),
        None => Submitted::default(),
    };
    let wanted = match request.engine.as_deref().map(EngineChoice::from_str) {
        None => config.engine,
        Some(Ok(wanted)) => wanted,
        Some(Err(why)) => {
            return found.add(Problem, Of::Job, "engine", why, ENGINE_RULE);
        }
    };
    let store = store(check, &config, found);
    let submission = check.submission.is_some();
    let (names, last) = names(&request, submission, store.as_ref(), found);
    // What a job keeps in its store has to be somewhere, even if that one cannot be used.
    let scratch = match store {
        Some(_) => None,
        None => tempfile::tempdir().ok(),
    };
    let instead = |scratch: &TempDir| Store::open(&scratch.path().join("store")).ok();
    if let Some(store) = store.clone().or_else(|| instead(scratch.as_ref()?)) {
        let command = match check.command.is_empty() {
            true => Some(submitted.interpreter()),
            false => understood(&mut request, &check.command, &store, found),
        };
        let place = command.and_then(|command| {
            let place = place(&request, &config, &last, &store, found)?;
            Some((command, place))
        });
        if let Some((command, place)) = place {
            match task::placement(&request, &config, &place, wanted) {
                Ok((wanted, placement)) => {
                    // Without a command the image is not looked into.
                    let placement = match command.is_empty() {
                        true => placement.or(Some(Placement::Injected)),
                        false => placement,
                    };
                    let wanted = (wanted, placement);
                    engines(check, &config, wanted, &place, &command, &store, found);
                }
                Err(why) => {
                    let why = format!("{why:#}");
                    found.add(Problem, Of::Job, "engine", why, PLACEMENT_RULE);
                }
            }
        }
    }
    gpu(&request, &submitted, submission, found);
    if let Some(store) = &store {
        room(store, &names, &last, found);
    }
    let partition = check
        .partition
        .clone()
        .or_else(|| submitted.partition())
        .or_else(|| of_job(submission, "SLURM_JOB_PARTITION"));
    time(&config, partition, &last, found);
}

/// What runs in the end for `command`, one that starts Apptainer included; `None` if that is nothing
/// that could be looked at.
fn understood(
    request: &mut Request,
    command: &[OsString],
    store: &Store,
    found: &mut Findings,
) -> Option<Vec<OsString>> {
    if request.image.is_some() {
        return Some(command.to_vec());
    }
    match command_line::understand(command, &store.options_memory()) {
        Ok(Understood::Container(line)) => Some(request.in_container(line)),
        Ok(Understood::Foreign) => Some(command.to_vec()),
        Ok(Understood::Passthrough) => {
            let cause = "it starts no application of its own: there is nothing to save";
            let cure = "make the command that runs the application resumable";
            found.add(Warning, Of::Job, "program", cause, cure);
            None
        }
        Err(why) => {
            let cure = "see whether the command runs without checkpoints";
            found.told(Problem, Of::Job, "program", &why.to_string(), cure);
            None
        }
    }
}

/// A variable of the job around this check; at submission that is another job.
fn of_job(submission: bool, name: &str) -> Option<String> {
    let outer = submission && std::env::var_os("SLURM_JOB_ID").is_some();
    let value = std::env::var(name).ok();
    value.filter(|value| !outer && !value.is_empty())
}

/// The store, opened as a job opens it.
fn store(check: &Check, config: &Config, found: &mut Findings) -> Option<Store> {
    let opened = around::chosen_store(&check.common, config).and_then(|dir| {
        let store = Store::open(&dir)?;
        store.try_writing()?;
        Ok(store)
    });
    match opened {
        Ok(store) => {
            let text = format!("{} can be written", store.dir().display());
            found.ok(Of::Job, "store", text);
            Some(store)
        }
        Err(why) => {
            let cure = "choose another directory as the store (--container-checkpoint-dir, `dir` in \
                        the configuration)";
            found.add(Problem, Of::Job, "store", format!("{why:#}"), cure);
            None
        }
    }
}

/// What a name's last checkpoints were.
#[derive(Default)]
struct Last {
    /// The sum of the newest generations of the name and its steps, in bytes.
    bytes: u64,
    /// That which took longest.
    slowest: Option<Cost>,
    newest: Option<Manifest>,
}

/// The name's cells that there are, and what they hold.
fn names(
    request: &Request,
    submission: bool,
    store: Option<&Store>,
    found: &mut Findings,
) -> (Vec<Cell>, Last) {
    let mut last = Last::default();
    let Some(pattern) = &request.name else {
        return (Vec::new(), last);
    };
    // Before it is submitted nobody knows a job's id.
    if pattern.contains('%') && (submission || Job::from_environment().is_none()) {
        return (Vec::new(), last);
    }
    let cells = Name::parse(&slurm::expand(pattern)).and_then(|name| {
        let Some(cell) = store.map(|store| store.name(&name)).filter(Cell::exists) else {
            return Ok(Vec::new());
        };
        cell.check()?;
        let steps = cell.steps()?;
        Ok(std::iter::once(cell).chain(steps).collect())
    });
    let cells: Vec<Cell> = match cells {
        Ok(cells) => cells,
        Err(why) => {
            let text = why.to_string();
            let (cause, cure) = text.split_once(": ").unwrap_or((&text, NAME_RULE));
            found.add(Problem, Of::Job, "name", cause, cure);
            return (Vec::new(), last);
        }
    };
    for cell in &cells {
        // What is damaged in there is for `verify`.
        let entries = cell.entries().unwrap_or_default();
        let newest = entries
            .into_iter()
            .rev()
            .filter(|entry| entry.bad.is_none());
        let Some(newest) = newest.filter_map(|entry| entry.generation.ok()).next() else {
            continue;
        };
        last.bytes = last.bytes.saturating_add(newest.manifest().bytes);
        let cost = supervise::cost(&newest);
        if cost.map(|cost| cost.took) > last.slowest.map(|cost| cost.took) {
            last.slowest = cost;
        }
        last.newest = Some(newest.manifest().clone());
    }
    (cells, last)
}

/// Image, Apptainer and what it needs; where the command can be looked at.
fn place(
    request: &Request,
    config: &Config,
    last: &Last,
    store: &Store,
    found: &mut Findings,
) -> Option<Place> {
    let Some(image) = &request.image else {
        return Some(Place::Bare);
    };
    let image = match task::image_path(image) {
        Ok(image) => whole(image, last, store, found)?,
        Err(why) => {
            let cure = "check the path: every node has to see the image there";
            found.told(Problem, Of::Job, "image", &format!("{why:#}"), cure);
            return None;
        }
    };
    let program = match task::apptainer(request, config) {
        Ok(program) => program,
        Err(why) => {
            found.told(
                Problem,
                Of::Node,
                "apptainer",
                &why.to_string(),
                "install Apptainer",
            );
            return None;
        }
    };
    let installed = apptainer(&program, found)?;
    if image.is_file() {
        fuse(&installed, found);
    }
    if !installed.setuid {
        namespaces("containers", Problem, found);
    }
    if !installed.user_binds {
        return None;
    }
    match task::place(request, config) {
        Ok(place) => Some(place),
        Err(why) => {
            found.told(
                Problem,
                Of::Job,
                "image",
                &format!("{why:#}"),
                ANOTHER_IMAGE,
            );
            None
        }
    }
}

/// Whether an image is whole, and still the one that the name's state was saved with.
fn whole(image: PathBuf, last: &Last, store: &Store, found: &mut Findings) -> Option<PathBuf> {
    let shown = image.display();
    let kind = if image.is_dir() {
        "a directory"
    } else {
        match sif::check(&image) {
            Ok(true) => "a SIF file, whole by its header",
            Ok(false) => "a file, not SIF",
            Err(why) => {
                found.add(
                    Problem,
                    Of::Job,
                    "image",
                    format!("{shown}: {why}"),
                    ANOTHER_IMAGE,
                );
                return None;
            }
        }
    };
    let saved = last.newest.as_ref().and_then(|last| last.image.as_ref());
    if let Some(saved) = saved {
        match image::digest(&image, &store.image_memory()) {
            Ok(digest) if digest.to_string() != saved.digest => {
                let cause = format!(
                    "{shown} is not the image that the saved state belongs to: a restart is refused"
                );
                let cure = "put the old image back, begin anew with \
                            --container-checkpoint-restart=fresh, or try =force";
                found.add(Problem, Of::Job, "image", cause, cure);
                return Some(image);
            }
            Ok(_) => {}
            Err(why) => {
                found.add(Problem, Of::Job, "image", why.to_string(), ANOTHER_IMAGE);
                return None;
            }
        }
    }
    found.ok(Of::Job, "image", format!("{shown} is {kind}"));
    Some(image)
}

/// Apptainer itself, and whether anything can be put into its containers.
pub fn apptainer(program: &Path, found: &mut Findings) -> Option<Installed> {
    let installed = match Installed::ask(program) {
        Ok(installed) => installed,
        Err(why) => {
            found.add(
                Problem,
                Of::Node,
                "apptainer",
                why,
                "install Apptainer anew",
            );
            return None;
        }
    };
    let conf = installed.conf.as_deref().map(Path::display);
    match (installed.user_binds, conf) {
        (false, Some(conf)) => found.add(
            Problem,
            Of::Node,
            "apptainer",
            format!("{conf} says `user bind control = no`: nothing can be put into containers"),
            "ask the administrator for `user bind control = yes` there",
        ),
        _ => {
            let how = if installed.setuid { ", setuid" } else { "" };
            let text = format!("{} ({}{how})", installed.version, program.display());
            found.ok(Of::Node, "apptainer", text);
        }
    }
    Some(installed)
}

/// Whether SIF files can be mounted.
pub fn fuse(installed: &Installed, found: &mut Findings) {
    let device = Path::new("/dev/fuse");
    let opened = std::fs::File::options().read(true).write(true).open(device);
    match opened {
        Ok(_) => found.ok(Of::Node, "fuse", "/dev/fuse can be used"),
        Err(why) => {
            // Setuid installations may mount by the kernel, the others unpack the image each time.
            let otherwise = if installed.setuid {
                "Apptainer may have to unpack SIF images at each start"
            } else {
                "Apptainer unpacks SIF images at each start"
            };
            let cause = format!("cannot use /dev/fuse: {why}; {otherwise}");
            let cure = "load the kernel's module fuse and give /dev/fuse the mode 0666, or use a \
                        sandbox directory as the image";
            found.add(Warning, Of::Node, "fuse", cause, cure);
        }
    }
}

/// Whether user namespaces can be made, for `whom`.
pub fn namespaces(whom: &str, level: Level, found: &mut Findings) {
    const CURE: &str = "set user.max_user_namespaces above 0 and, where they are there, \
                        kernel.unprivileged_userns_clone=1 and \
                        kernel.apparmor_restrict_unprivileged_userns=0 (sysctl)";
    if let Some(switch) = probe::namespaces_off() {
        let cause = format!("user namespaces, which {whom} need, are off: {switch} is 0");
        return found.add(level, Of::Node, "userns", cause, CURE);
    }
    // Switches are not all there is: AppArmor lets a namespace be made and forbids to use it.
    let tried = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "true"])
        .stdin(std::process::Stdio::null())
        .output();
    match tried {
        Ok(out) if !out.status.success() => {
            let said = String::from_utf8_lossy(&out.stderr);
            let cause = format!(
                "user namespaces, which {whom} need, cannot be made: {}",
                said.trim()
            );
            found.add(level, Of::Node, "userns", cause, CURE);
        }
        Ok(_) => found.ok(Of::Node, "userns", "user namespaces can be made"),
        Err(why) => found.add(
            Warning,
            Of::Node,
            "userns",
            format!("cannot run unshare, which tries out user namespaces: {why}"),
            "install util-linux",
        ),
    }
}

/// Program and engines: what a job would try, in its order.
fn engines(
    check: &Check,
    config: &Config,
    (wanted, placement): (EngineChoice, Option<Placement>),
    place: &Place,
    command: &[OsString],
    store: &Store,
    found: &mut Findings,
) {
    let (engines, missing, runtime) = match task::engines(config, store.dir(), wanted, placement) {
        Ok(found) => found,
        Err(why) => {
            let cure = "choose another directory as the store (--container-checkpoint-dir)";
            return found.told(Problem, Of::Job, "store", &format!("{why:#}"), cure);
        }
    };
    let Ok(facts) = program(place, command, &runtime, found) else {
        return;
    };
    let explicit = wanted != EngineChoice::Auto;
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
            (None, Kind::Criu) if check.submission.is_some() => Some("installed here".into()),
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
                let version = engine.version();
                let text = format!("{kind} {version} can hold it");
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

/// Whether the job has a GPU.
fn gpu(request: &Request, submitted: &Submitted, submission: bool, found: &mut Findings) {
    let variable = |name: &str| of_job(submission && name.starts_with("SLURM_"), name);
    let by = || gpu::asked(&request.apptainer_options, request.line.as_ref(), variable);
    if let Some(by) = submitted.gpu().or_else(by) {
        let known::Doubt { cause, cure } = known::gpu(&by);
        found.add(Warning, Of::Job, "gpu", cause, cure);
    }
}

/// Room for one checkpoint more.
fn room(store: &Store, cells: &[Cell], last: &Last, found: &mut Findings) {
    let known = last.newest.is_some();
    match store.room_for(last.bytes) {
        Ok(Ok(())) if known => {
            let text = format!(
                "there is room for another {} like the last checkpoint",
                bytes_for_people(last.bytes)
            );
            found.ok(Of::Job, "room", text);
        }
        Ok(Ok(())) => {
            let text = match cells.is_empty() {
                true => "how much will be needed is not known: no such name was saved yet",
                false => "how much will be needed is not known: nothing was saved yet",
            };
            found.ok(Of::Job, "room", text);
        }
        Ok(Err(shortage)) => {
            // Older generations go before that.
            let level = if known { Warning } else { Problem };
            let text = shortage.to_string();
            let (cause, cure) = text
                .split_once(": ")
                .unwrap_or((&text, "name a larger store"));
            found.add(level, Of::Job, "room", cause, cure);
        }
        Err(why) => found.add(
            Problem,
            Of::Job,
            "room",
            why.to_string(),
            "choose another directory as the store (--container-checkpoint-dir)",
        ),
    }
}

/// Whether the time between Slurm's first signal and its last is enough.
fn time(config: &Config, partition: Option<String>, last: &Last, found: &mut Findings) {
    let asked = site::site().and_then(|site| {
        let partition = site::partition(partition.as_deref())?;
        Ok((site, partition))
    });
    let (site, queue) = match asked {
        Ok(asked) => asked,
        Err(SlurmError::Start(..)) => {
            return found.ok(
                Of::Node,
                "time",
                "Slurm is not here to be asked how much there is",
            );
        }
        Err(why) => {
            let cure = "see whether Slurm's controller runs (scontrol ping)";
            return found.add(Warning, Of::Node, "time", why.to_string(), cure);
        }
    };
    if !site.requeue {
        let cause = "jobs are not requeued here unless they say so (JobRequeue=0)";
        found.add(Warning, Of::Job, "requeue", cause, "submit with --requeue");
    }
    let (notice, named) = notice(&site, queue.as_ref());
    match last.slowest.filter(|_| last.newest.is_some()) {
        Some(cost) => {
            let needed = policy::lead_time(cost.bytes, Some(cost), config.safety);
            let text = format!(
                "a checkpoint like the last ({} in {}) needs {}, and a pre-empted job has {} ({named})",
                bytes_for_people(cost.bytes),
                seconds(cost.took),
                seconds(needed),
                seconds(notice),
            );
            if needed <= notice {
                return found.ok(Of::Job, "time", text);
            }
            let cure = "take checkpoints in between (--container-checkpoint-interval=auto), use a \
                        partition with a GraceTime, or have the administrator raise KillWait";
            found.add(Warning, Of::Job, "time", text, cure);
        }
        None => {
            let fits = policy::fits(notice, config.safety);
            let text = format!("a pre-empted job has {} ({named})", seconds(notice));
            if fits >= SOMETHING {
                let fits = bytes_for_people(fits);
                let text =
                    format!("{text}: enough for about {fits} of memory, more on a fast store");
                return found.ok(Of::Job, "time", text);
            }
            let cause = format!("{text}: not enough for any but the smallest applications");
            let cure = "take checkpoints in between (--container-checkpoint-interval=auto), use a \
                        partition with a GraceTime, or have the administrator raise KillWait";
            found.add(Warning, Of::Job, "time", cause, cure);
        }
    }
}

/// Memory of an application that is more than a toy.
const SOMETHING: u64 = 256 << 20;

/// From the first signal of a pre-emption to SIGKILL, and what it is made of.
fn notice(site: &Site, queue: Option<&Partition>) -> (Duration, String) {
    let kill_wait = seconds(site.kill_wait);
    match queue.filter(|queue| queue.preempt != "OFF" && !queue.grace.is_zero()) {
        Some(queue) => (
            site.kill_wait + queue.grace,
            format!(
                "KillWait {kill_wait}, GraceTime {} of {}",
                seconds(queue.grace),
                queue.name
            ),
        ),
        None => (site.kill_wait, format!("KillWait {kill_wait}")),
    }
}

fn seconds(time: Duration) -> String {
    output::duration(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
