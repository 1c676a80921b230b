//! From what the user asked for to one computation: the name, the place, the engines, the store.
//!
//! Contract: everything that can be wrong with a request is found here, before anything is started
//! or written, and told in one sentence.

mod streams;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use nix::sys::signal::Signal;

use crate::cli::Run;
use crate::commands;
use crate::config::{self, Config, EngineChoice, Interval, OnUnavailable, PlacementChoice};
use crate::container::command_line::{self, Line, Understood};
use crate::container::gpu;
use crate::container::inspect;
use crate::container::shell_action::{self, Shell};
use crate::container::{Apptainer, Inside, Place};
use crate::engine::{End, Engine, Placement, Ranks, criu, dmtcp};
use crate::front;
use crate::holder;
use crate::runtime::{Runtime, RuntimeError};
use crate::slurm::{self, Job, Step};
use crate::stage::{self, Identity};
use crate::store::{self, Cell, Generation, ImageRecord, Name, StepKey, Store};
use crate::streams::Streams;
use crate::supervise::{self, Computation, Fatal, Restart, Signals, script};
use crate::words::variable;

/// What the user asked for, by option or by variable.
#[derive(Default, Clone)]
pub struct Request {
    pub name: Option<String>,
    pub image: Option<PathBuf>,
    pub engine: Option<String>,
    pub placement: Option<String>,
    pub restart: Option<String>,
    /// `NAME@GENERATION` to begin from.
    pub from: Option<String>,
    pub dir: Option<PathBuf>,
    pub interval: Option<String>,
    pub signal: Option<String>,
    pub config: Option<PathBuf>,
    pub steal_lock: bool,
    /// The user's own options of `apptainer exec`.
    pub apptainer_options: Vec<OsString>,
    /// The user's own command line of Apptainer that `image` is from.
    pub line: Option<Line>,
    /// Of a step or stage.
    pub streams: Option<Arc<Streams>>,
}

impl Request {
    /// What the plugin, or the user, has put into the environment.
    pub fn from_environment() -> Request {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Request {
            name: text(variable::NAME),
            image: text(variable::IMAGE).map(PathBuf::from),
            engine: text(variable::ENGINE),
            placement: text(variable::PLACEMENT),
            restart: text(variable::RESTART),
            from: None,
            dir: dir_of_variable(),
            interval: text(variable::INTERVAL),
            signal: text(variable::SIGNAL),
            config: text(variable::CONFIG).map(PathBuf::from),
            steal_lock: false,
            apptainer_options: Vec::new(),
            line: None,
            streams: None,
        }
    }

    /// What `container-checkpoint run` asks for, and the command; `raw` is its command line.
    pub fn of_run(run: Run, raw: &[OsString]) -> anyhow::Result<(Request, Vec<OsString>)> {
        // The first word is the image, unless it was set apart by `--`.
        let bare = raw
            .iter()
            .rev()
            .nth(run.words.len())
            .is_some_and(|word| word == "--");
        let mut command = run.words;
        let image = (!bare && !command.is_empty()).then(|| command.remove(0).into());
        let script = match (run.startscript, run.runscript) {
            (true, _) => Some("/.singularity.d/startscript"),
            (_, true) => Some("/.singularity.d/runscript"),
            _ => None,
        };
        if let Some(script) = script {
            if image.is_none() {
                bail!("--startscript and --runscript need an image that has one");
            }
            command.insert(0, script.into());
        }
        let request = Request {
            name: run.name,
            image,
            engine: run.engine,
            placement: run.placement,
            restart: run.restart,
            from: run.from,
            dir: run.dir.as_deref().map(dir_of_option).transpose()?,
            interval: run.interval,
            signal: run.signal,
            config: run.config,
            steal_lock: run.steal_lock,
            apptainer_options: run.apptainer_options,
            line: None,
            streams: None,
        };
        Ok((request, command))
    }

    /// This request with what `other` says put over it.
    pub fn or_else(self, other: Request) -> Request {
        Request {
            name: self.name.or(other.name),
            image: self.image.or(other.image),
            engine: self.engine.or(other.engine),
            placement: self.placement.or(other.placement),
            restart: self.restart.or(other.restart),
            from: self.from.or(other.from),
            dir: self.dir.or(other.dir),
            interval: self.interval.or(other.interval),
            signal: self.signal.or(other.signal),
            config: self.config.or(other.config),
            steal_lock: self.steal_lock || other.steal_lock,
            apptainer_options: [self.apptainer_options, other.apptainer_options].concat(),
            line: self.line.or(other.line),
            streams: self.streams.or(other.streams),
        }
    }

    /// Makes this the request of a container that a command line of Apptainer starts; its command
    /// inside.
    pub fn in_container(&mut self, line: Line) -> Vec<OsString> {
        self.image = Some(line.image.clone());
        let command = line.command.clone();
        self.line = Some(line);
        command
    }
}

/// A request, read and checked.
struct Settings {
    config: Config,
    name: Name,
    store: Store,
    restart: Restart,
    from: Option<Generation>,
    interval: Option<Interval>,
    signal: Option<Signal>,
    job: Option<Job>,
}

/// A task in front of which the plugin has put the helper: the batch script, or a step's task.
pub fn task(command: Vec<OsString>, signals: &mut Signals) -> anyhow::Result<End> {
    let mut request = Request::from_environment();
    if is_ourselves(&command) {
        // `srun container-checkpoint run …` says itself what it wants.
        return Err(exec(command));
    }
    end_with_slurmstepd()?;
    front::enter(signals).context("cannot go behind a front")?;
    let settings = settings(&request)?;
    let Some(job) = settings.job.clone() else {
        bail!("the helper was started as a task, but there is no Slurm job in its environment");
    };
    let name = settings.store.name(&settings.name);
    match (job.step, &request.image) {
        (Step::Batch, None) => {
            let script = script::Script {
                holder: holder::own(Some(&job))?,
                name,
                job,
                command,
                steal_lock: request.steal_lock,
                signal: settings.signal,
                config: settings.config,
            };
            Ok(script::run(script, signals, &holder::Slurm)?)
        }
        (Step::Batch, Some(_)) => {
            let script = PathBuf::from(&command[0]);
            run_one(settings, request, name, command, Some(script), signals)
        }
        (Step::Number(_) | Step::Stage, _) => {
            let inside = match understood(&settings, &mut request, &command)? {
                Some(inside) => inside,
                None => return Err(exec(command)),
            };
            let key = step_key(&name, &job, &request, &command)?;
            let command = inside;
            let cell = name.step(&key);
            request.streams = streams::of_step(&cell, &job, &settings)?;
            run_one(settings, request, cell, command, None, signals)
        }
    }
}

/// A container that a batch script starts by itself: `words` is its command line. Returns only for
/// one that is kept resumable, or cannot be started.
pub fn stage(words: Vec<OsString>) -> anyhow::Result<End> {
    let pass_through = || {
        log::error!("{}", stage::pass_through(&words));
        Ok(End::Exit(127))
    };
    let mut request = Request::from_environment();
    let mut settings = settings(&request)?;
    let Some(job) = settings.job.take() else {
        return pass_through();
    };
    let job = Job {
        step: Step::Stage,
        ..job
    };
    let name = settings.store.name(&settings.name);
    let Some(script) = stage::script(&name, &holder::own(Some(&job))?)? else {
        return pass_through();
    };
    stage::speak_for(&script)?;
    let understood = command_line::understand(&words, &settings.store.options_memory());
    let command = match understood {
        Ok(Understood::Container(line)) => request.in_container(line),
        Ok(Understood::Passthrough | Understood::Foreign) => return pass_through(),
        Err(why) if why.is_refusal() => {
            if settings.config.on_unavailable == OnUnavailable::Fail {
                bail!(why);
            }
            log::warn!("the application runs without checkpoints: {why}");
            return pass_through();
        }
        // The program itself says best what is wrong with its command line.
        Err(why) => {
            log::debug!("{why}");
            return pass_through();
        }
    };
    if stage::shares_input() {
        log::warn!(
            "{} runs without checkpoints: its standard input is a pipe that the script reads, too. \
             If it needs none, say so by `< /dev/null`",
            shown(&words)
        );
        return pass_through();
    }
    let key = stage::claim(&name, (job.id, job.run), &Identity::of_this_process(&words))?;
    stage::end_with(&script)?;
    let job_id = job.id;
    settings.job = Some(job);
    let mut signals = Signals::take()?;
    let cell = name.step(&key);
    request.streams = Some(streams::of_stage(&cell, job_id, &settings, &script)?);
    run_one(settings, request, cell, command, None, &mut signals)
}

/// Once slurmstepd is gone (killed, out of memory), Slurm takes the job for lost and starts it again:
/// it must not go on here as well and write to the same files. slurmstepd forks its tasks in its first
/// thread (fork_all_tasks() in its mgr.c), which lasts as long as it does.
fn end_with_slurmstepd() -> anyhow::Result<()> {
    crate::sys::die_with_parent(libc::SIGKILL).context("cannot be tied to slurmstepd")
}

/// Makes a `run` in a batch script before which a helper stands a stage of it, under its own name.
/// Says whether there is such a helper, which then tells this process when the job ends.
fn become_stage(settings: &mut Settings, request: &mut Request, job: Job) -> anyhow::Result<bool> {
    let Ok(name) = std::env::var(variable::NAME) else {
        return Ok(false);
    };
    let name = Name::parse(&slurm::expand(&name))?;
    let job = Job {
        step: Step::Stage,
        ..job
    };
    let script = stage::script(&settings.store.name(&name), &holder::own(Some(&job))?)?;
    // What it would have to keep of such a pipe is not its own.
    let Some(script) = script.filter(|_| name != settings.name && !stage::shares_input()) else {
        return Ok(false);
    };
    stage::speak_for(&script)?;
    stage::end_with(&script)?;
    let cell = settings.store.name(&settings.name);
    store::disk::private_dir(cell.dir(), false)?;
    request.streams = Some(streams::of_stage(&cell, job.id, settings, &script)?);
    settings.job = Some(job);
    Ok(true)
}

/// Whether this is below a batch script: Slurm sets it there, not for the shell of an salloc.
fn in_batch_job() -> bool {
    std::env::var_os("ENVIRONMENT").is_some_and(|value| value == "BATCH")
}

/// `container-checkpoint run`: `command` in the image of the request, or on the host without one.
pub fn run(
    mut request: Request,
    command: Vec<OsString>,
    signals: &mut Signals,
) -> anyhow::Result<End> {
    // It keeps what it starts itself.
    if let Some(why) = stage::uncaught() {
        bail!(why);
    }
    let is_task = front::is_task();
    if is_task == Some(true) {
        end_with_slurmstepd()?;
    }
    front::enter(signals).context("cannot go behind a front")?;
    let mut settings = settings(&request)?;
    let in_script = |job: &Job| in_batch_job() && job.step == Step::Batch && is_task == Some(false);
    let under_script = match settings.job.clone().filter(in_script) {
        Some(job) => become_stage(&mut settings, &mut request, job)?,
        None => true,
    };
    if !under_script {
        log::warn!(
            "this is a line of a batch script, and Slurm ends the script first: a pre-emption or a \
             cancellation leaves no time to save {}. As `srun container-checkpoint run …`, or `exec \
             container-checkpoint run …` as the script's last line, it is saved",
            settings.name
        );
    }
    let cell = settings.store.name(&settings.name);
    let Some(command) = understood(&settings, &mut request, &command)? else {
        return Err(exec(command));
    };
    if let Some(job) = settings.job.as_ref().filter(|_| is_task == Some(true)) {
        request.streams = streams::of_step(&cell, job, &settings)?;
    }
    let is_shell = shell_of(&request).is_some() || inspect::reads_commands(&command);
    if is_shell && is_task != Some(true) && request.streams.is_none() {
        request.streams = streams::input_of_shell(&cell, settings.job.as_ref(), &settings)?;
    }
    let command = match (command.is_empty(), &request.image) {
        (true, Some(_)) if shell_of(&request).is_some() => command,
        // What `apptainer run` would do.
        (true, Some(_)) => vec![command_line::RUNSCRIPT.into()],
        (true, None) => bail!("there is neither an image nor a command to run"),
        (false, _) => command,
    };
    run_one(settings, request, cell, command, None, signals)
}

/// What runs in the end for `command`. One that starts Apptainer becomes the request's container, if
/// that has none; `None` for one in which there is nothing to save.
fn understood(
    settings: &Settings,
    request: &mut Request,
    command: &[OsString],
) -> anyhow::Result<Option<Vec<OsString>>> {
    if request.image.is_some() {
        return Ok(Some(command.to_vec()));
    }
    match command_line::understand(command, &settings.store.options_memory()) {
        Ok(Understood::Container(line)) => Ok(Some(request.in_container(line))),
        Ok(Understood::Foreign) => Ok(Some(command.to_vec())),
        Ok(Understood::Passthrough) => {
            log::info!(
                "{} runs without checkpoints: it starts no application of its own",
                shown(command)
            );
            Ok(None)
        }
        Err(why) if why.is_refusal() && settings.config.on_unavailable == OnUnavailable::Run => {
            log::warn!("the application runs without checkpoints: {why}");
            Ok(None)
        }
        Err(why) => Err(why.into()),
    }
}

/// The first words of a command line, for a message.
fn shown(command: &[OsString]) -> String {
    let words: Vec<_> = command
        .iter()
        .take(2)
        .map(|w| w.to_string_lossy())
        .collect();
    words.join(" ")
}

fn run_one(
    settings: Settings,
    request: Request,
    cell: Cell,
    command: Vec<OsString>,
    script: Option<PathBuf>,
    signals: &mut Signals,
) -> anyhow::Result<End> {
    let mut place = place(&request, &settings.config)?;
    let wanted = match &request.engine {
        Some(word) => EngineChoice::from_str(word).map_err(|why| anyhow!("engine: {why}"))?,
        None => settings.config.engine,
    };
    let (wanted, placement) = placement(&request, &settings.config, &place, wanted)?;
    let (mut engines, mut missing, runtime) =
        engines(&settings.config, settings.store.dir(), wanted, placement)?;
    if let Some(why) = on_gpus(&place) {
        engines.clear();
        missing = vec![why];
    }
    let command = match shell_of(&request) {
        Some(shell) => shell_action::settle(shell, &mut place, runtime.dir())
            .map_err(|why| anyhow!("the application was not started: {why}"))?,
        None => command,
    };
    let job = settings.job;
    let ranks = match &job {
        Some(job) => Ranks {
            rank: job.rank,
            count: job.ranks,
            one_node: job.nodes == 1,
        },
        None => Ranks {
            rank: 0,
            count: 1,
            one_node: true,
        },
    };
    if ranks.count > 1 && inspect::reads_commands(&command) {
        engines.clear();
        missing = vec![format!(
            "each of the {} tasks of this step reads the shell's commands, and what was read is known of \
             the first one's alone; let them run a script (`exec IMAGE bash script.sh`)",
            ranks.count
        )];
    }
    if ranks.rank == 0 {
        warn_of_lost_files(&place);
    }
    let image = match &place {
        Place::Apptainer(apptainer) if ranks.rank == 0 => {
            Some(image_record(&apptainer.image, &settings.store)?)
        }
        _ => None,
    };
    let on_unavailable = settings.config.on_unavailable;
    let unprotected = (place.clone(), command.clone(), script.clone());
    let streams = request.streams.clone();
    let computation = Computation {
        title: cell.label(),
        name: settings.store.name(&settings.name),
        cell,
        holder: holder::own(job.as_ref())?,
        job,
        place,
        gpu: gpu::asked(&request.apptainer_options, request.line.as_ref(), |name| {
            std::env::var(name).ok()
        }),
        image,
        command,
        script,
        engines,
        missing,
        ranks,
        restart: settings.restart,
        from: settings.from,
        steal_lock: request.steal_lock,
        interval: settings.interval,
        signal: settings.signal,
        config: settings.config,
        runtime,
        streams: request.streams,
    };
    match supervise::run(computation, signals, &holder::Slurm) {
        Err(Fatal::Unavailable(why)) if on_unavailable == OnUnavailable::Run => {
            if let Some(streams) = streams {
                streams
                    .give_back()
                    .context("cannot give the streams back")?;
            }
            log::warn!("the application runs without checkpoints: {why}");
            let (mut place, command, script) = unprotected;
            if let (Place::Apptainer(apptainer), Some(script)) = (&mut place, script) {
                apptainer.binds.push(crate::container::Bind {
                    inside: script.clone(),
                    host: script,
                    writable: false,
                });
            }
            let inside = Inside {
                argv: command,
                ..Inside::default()
            };
            Err(exec_command(place.command(&inside)))
        }
        other => Ok(other?),
    }
}

/// What says which shell the request is for, if it is for `apptainer shell`.
pub fn shell_of(request: &Request) -> Option<&Shell> {
    request.line.as_ref()?.shell.as_ref()
}

/// Why nothing can be saved of an application that its user gives the job's GPUs. Without GPUs in the
/// job such an option does nothing.
pub fn on_gpus(place: &Place) -> Option<String> {
    let Place::Apptainer(apptainer) = place else {
        return None;
    };
    let option = ["nv", "nvccli", "rocm"]
        .into_iter()
        .find(|option| apptainer.flags.contains(*option))?;
    let gpus = ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"]
        .into_iter()
        .find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))?;
    Some(format!(
        "--{option} gives the application the GPUs that this job has ({gpus}), and what is on a GPU \
         cannot be saved; leave --{option} out, or ask for no GPUs"
    ))
}

/// Tells of files that the application may lose with its container.
fn warn_of_lost_files(place: &Place) {
    let Place::Apptainer(apptainer) = place else {
        return;
    };
    let on = |options: &[&'static str]| {
        let given = |option: &&&str| apptainer.flags.contains(**option);
        options.iter().find(given).copied()
    };
    if let (Some(option), None) = (
        on(&["contain", "containall", "compat", "scratch"]),
        on(&["workdir"]),
    ) {
        log::warn!(
            "--{option} gives the application directories such as /tmp that are gone with the \
             container: a file that is open there keeps it from going on. Give them a place that \
             stays with --workdir DIR"
        );
    }
    if let Some(option) = on(&["writable-tmpfs", "compat"]) {
        log::warn!(
            "--{option}: what the application writes into the image is gone when it goes on in \
             another container; use an --overlay for what has to stay"
        );
    }
}

/// Where DMTCP has to come from, if anywhere, and which engine that leaves of `wanted`.
pub fn placement(
    request: &Request,
    config: &Config,
    place: &Place,
    wanted: EngineChoice,
) -> anyhow::Result<(EngineChoice, Option<Placement>)> {
    let word = request.placement.as_deref();
    let choice = match word {
        Some(word) => PlacementChoice::from_str(word).map_err(|why| anyhow!("placement: {why}"))?,
        None => config.placement,
    };
    let wanted = match (word, choice, wanted) {
        (None, _, _) | (_, PlacementChoice::Auto, _) => wanted,
        // Whoever says where DMTCP is to come from wants DMTCP.
        (Some(_), _, EngineChoice::Auto | EngineChoice::Dmtcp) => EngineChoice::Dmtcp,
        (Some(word), _, EngineChoice::Criu) => {
            bail!("the placement ({word}) is DMTCP's, and the engine is to be criu")
        }
    };
    let placement = match (choice, place) {
        (PlacementChoice::Contained, Place::Apptainer(_)) => Some(Placement::Contained),
        (PlacementChoice::Contained, Place::Bare) if word.is_some() => {
            bail!("the placement contained needs a container image whose DMTCP is used")
        }
        (PlacementChoice::Auto, Place::Apptainer(_)) => None,
        _ => Some(Placement::Injected),
    };
    Ok((wanted, placement))
}

/// What a generation says of the container image: a restart compares it.
fn image_record(path: &Path, store: &Store) -> anyhow::Result<ImageRecord> {
    let digest = crate::container::image::digest(path, &store.image_memory())?;
    Ok(ImageRecord {
        path: store::escape(path.as_os_str()),
        digest: digest.to_string(),
    })
}

fn settings(request: &Request) -> anyhow::Result<Settings> {
    let config = Config::load(request.config.as_deref())?;
    let from = match &request.from {
        Some(text) => Some(commands::Target::parse(text).context("from")?),
        None => None,
    };
    let name = match (&request.name, &from) {
        (Some(pattern), _) => Name::parse(&slurm::expand(pattern))?,
        (None, Some(from)) => from.name().context("from")?,
        (None, None) => {
            bail!("there is no checkpoint name: give one with --name or --container-checkpoint")
        }
    };
    let restart = match &request.restart {
        Some(word) => Restart::from_str(word).map_err(|why| anyhow!("restart: {why}"))?,
        None => Restart::Auto,
    };
    let interval = match &request.interval {
        Some(word) => Some(Interval::from_str(word).map_err(|why| anyhow!("interval: {why}"))?),
        None => None,
    };
    let signal = match &request.signal {
        Some(word) => Some(config::request_signal(word).map_err(|why| anyhow!("signal: {why}"))?),
        None => config.signal,
    };
    let store = Store::open(&store_dir(request.dir.as_deref(), &config)?).map_err(|why| {
        anyhow!("{why}; choose another directory as the store (--container-checkpoint-dir)")
    })?;
    let from = match &from {
        Some(_) if restart == Restart::Fresh => {
            bail!(
                "from the beginning, or from a generation? --restart=fresh and --from exclude each other"
            )
        }
        Some(target) => Some(target.generation(&store).context("from")?),
        None => None,
    };
    Ok(Settings {
        name,
        store,
        restart,
        from,
        interval,
        signal,
        job: Job::from_environment(),
        config,
    })
}

/// The store that the user chose by option or variable, where `%h` and `%u` may stand.
pub fn dir_of_variable() -> Option<PathBuf> {
    dir_of(&std::env::var(variable::DIR).ok()?)
}

/// The store that `--dir` of a command stands for. Unlike in a job's options, people mean the
/// directory they are in.
pub fn dir_of_option(dir: &Path) -> anyhow::Result<PathBuf> {
    let expanded = dir.to_str().and_then(dir_of);
    std::path::absolute(expanded.as_deref().unwrap_or(dir))
        .with_context(|| format!("cannot use --dir {}", dir.display()))
}

/// The store that a user's `pattern` stands for; none for an empty one.
pub fn dir_of(pattern: &str) -> Option<PathBuf> {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid());
    match user {
        _ if pattern.is_empty() => None,
        Ok(Some(user)) => Some(config::expand_store(pattern, &user.dir, &user.name)),
        // That is told where the store is looked for.
        _ => Some(pattern.into()),
    }
}

/// The store's directory: the user's choice, or the configured one.
pub fn store_dir(chosen: Option<&Path>, config: &Config) -> anyhow::Result<PathBuf> {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid())
        .context("cannot look up this user")?
        .ok_or_else(|| anyhow!("uid {} has no entry in passwd", nix::unistd::getuid()))?;
    let dir = match chosen {
        Some(dir) => dir.to_path_buf(),
        None => config.store(&user.dir, &user.name),
    };
    if !dir.is_absolute() {
        bail!(
            "the store's directory has to be an absolute path, not {}",
            dir.display()
        );
    }
    Ok(dir)
}

/// Where the command of a request runs.
pub fn place(request: &Request, config: &Config) -> anyhow::Result<Place> {
    let Some(image) = &request.image else {
        return Ok(Place::Bare);
    };
    let image = image_path(image).map_err(|why| match why.is::<std::io::Error>() {
        true => anyhow!("{why:#}; {MISSING_IMAGE}"),
        false => why,
    })?;
    let options = config.apptainer_options.iter().map(OsString::from);
    let line = request.line.as_ref();
    let has = |flag: &str| line.is_some_and(|line| line.flags.contains(flag));
    let inside = crate::container::INSIDE.trim_start_matches('/');
    if has("writable") && image.is_dir() && !image.join(inside).is_dir() {
        bail!(
            "the option --writable cannot be combined with checkpoints as it is: Apptainer then makes \
             no directory for what is bound into the image. Make one (`mkdir {0}/{inside}`), or use \
             --writable-tmpfs or an --overlay",
            image.display()
        );
    }
    Ok(Place::Apptainer(Apptainer {
        prefix: line.map(|line| line.prefix.clone()).unwrap_or_default(),
        program: apptainer(request, config)?,
        globals: line.map(|line| line.globals.clone()).unwrap_or_default(),
        options: options
            .chain(request.apptainer_options.iter().cloned())
            .chain(line.into_iter().flat_map(|line| line.options.clone()))
            .collect(),
        flags: line.map(|line| line.flags.clone()).unwrap_or_default(),
        image,
        binds: Vec::new(),
        variables: Vec::new(),
    }))
}

/// The way out where an image cannot be used.
pub const MISSING_IMAGE: &str = "check the path: every node has to see the image there";

/// The absolute path of a container image, which exists. The cause of an error is
/// [`std::io::Error`] where it cannot be seen.
pub fn image_path(image: &Path) -> anyhow::Result<PathBuf> {
    let shown = image.display();
    if shown.to_string().starts_with("instance://") {
        bail!(
            "{shown} is a running instance, which lives on when this command has ended: run the \
             application in the image itself (`apptainer exec app.sif …`)"
        );
    }
    if image.to_string_lossy().contains("://") {
        bail!(
            "the image {shown} is an address: pull it into a file first (`apptainer pull app.sif \
             {shown}`), so that every run has the same"
        );
    }
    let image = image
        .canonicalize()
        .with_context(|| format!("cannot use the image {shown}"))?;
    if let Some(byte) = [':', ',']
        .iter()
        .find(|c| image.to_string_lossy().contains(**c))
    {
        bail!("the path of the image {shown} holds a `{byte}`, which Apptainer cannot take");
    }
    Ok(image)
}

/// The program that starts containers.
pub fn apptainer(request: &Request, config: &Config) -> anyhow::Result<PathBuf> {
    match (&request.line, &config.apptainer) {
        (Some(line), _) => Ok(line.program.clone()),
        (None, Some(program)) => Ok(program.clone()),
        (None, None) => ["apptainer", "singularity"]
            .iter()
            .find_map(|name| command_line::find(name.as_ref()))
            .ok_or_else(|| {
                anyhow!(
                    "neither apptainer nor singularity is in PATH on this node; install \
                     Apptainer, or set `apptainer` in {}",
                    config::DEFAULT_PATH
                )
            }),
    }
}

type Found = (Vec<Arc<dyn Engine>>, Vec<String>, Runtime);

/// The engines of this node that may be used, and why the others are not there. `store` is where
/// the programs for containers are kept; `placement` is where DMTCP has to come from, if anywhere.
pub fn engines(
    config: &Config,
    store: &Path,
    wanted: EngineChoice,
    placement: Option<Placement>,
) -> anyhow::Result<Found> {
    let mut engines: Vec<Arc<dyn Engine>> = Vec::new();
    let mut missing = Vec::new();
    if wanted != EngineChoice::Criu {
        let search = dmtcp::installation::Search::here(&config.dmtcp, config.dmtcp_conf.as_deref());
        match dmtcp::Dmtcp::find(&search, placement) {
            Ok(found) => engines.push(Arc::new(found)),
            Err(why) => missing.push(format!("dmtcp: {why}")),
        }
    }
    let mut criu = None;
    if wanted != EngineChoice::Dmtcp {
        match criu::Criu::find(config.criu.as_deref()) {
            Ok(found) => {
                criu = Some(found.program().to_path_buf());
                engines.push(Arc::new(found));
            }
            Err(why) => missing.push(format!("criu: {why}")),
        }
    }
    let runtime = Runtime::prepare(store, criu.as_deref()).map_err(|why| {
        let dir = match why {
            RuntimeError::Io { .. } => {
                "; is the store yours to write to, and is there room? Choose another directory \
                     (--container-checkpoint-dir) if not"
            }
            _ => "",
        };
        anyhow!("cannot prepare the programs for the container: {why}{dir}")
    })?;
    Ok((engines, missing, runtime))
}

/// The key of this step: what it runs, and for the how-many-th time in this run. It does not
/// depend on the step's number, so that a script that changes its course still finds its states.
fn step_key(
    name: &Cell,
    job: &Job,
    request: &Request,
    command: &[OsString],
) -> anyhow::Result<StepKey> {
    let (run, step) = ((job.id, job.run), job.step.to_string());
    if job.rank != 0 {
        return Ok(name.claimed_step(run, &step)?);
    }
    let mut hash = blake3::Hasher::new();
    for word in command {
        hash.update(word.as_encoded_bytes()).update(b"\0");
    }
    if let Some(image) = &request.image {
        hash.update(image.as_os_str().as_encoded_bytes());
    }
    hash.update(format!("\0{}", job.ranks).as_bytes());
    let digest = hash.finalize().to_hex();
    let base = Path::new(&command[0])
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let base: String = base
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        .take(24)
        .collect();
    let stem = format!("{base}-{}", &digest[..8]);
    Ok(name.claim_step(&stem, run, &step)?)
}

fn is_ourselves(command: &[OsString]) -> bool {
    Path::new(&command[0])
        .file_name()
        .is_some_and(|name| name == "container-checkpoint")
}

/// Becomes `command`; an error if that fails.
fn exec(command: Vec<OsString>) -> anyhow::Error {
    let mut program = std::process::Command::new(&command[0]);
    program.args(&command[1..]);
    exec_command(program)
}

fn exec_command(mut command: std::process::Command) -> anyhow::Error {
    use std::os::unix::process::CommandExt;
    let why = command.exec();
    anyhow!(
        "cannot run {}: {why}",
        command.get_program().to_string_lossy()
    )
}
