//! Findings about the containers that the lines of a batch script start.
//!
//! Contract: best effort and never wrong. A line counts as far as its words are certain before the
//! script runs ([`crate::shellscript`]), and what cannot be known of it is left out without a word:
//! an image that the script may make first is not missed, a program whose place may be made first
//! neither. A problem is one only where the line runs in any case and nothing before it can have
//! changed that; else it is a warning. Each finding is told once, with the first line that has it.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;

use super::engines::{self, Asked};
use super::state::Last;
use super::{Finding, Findings, Level, Of, containers};
use crate::cli::{Cli, Command as Subcommand};
use crate::config::{Config, EngineChoice, OnUnavailable};
use crate::container::command_line::{self, Understood};
use crate::container::{gpu, wrapper};
use crate::engine::known;
use crate::shellscript::{self, Command, Runs, Word};
use crate::slurm::srun::Srun;
use crate::store::Store;
use crate::task::{self, Request};

use Level::{Problem, Warning};

/// Shells whose language is read here.
const SHELLS: &[&str] = &["sh", "bash", "dash", "ksh"];

/// Commands that make no images or programs and change nothing that is tracked here.
const HARMLESS: &[&str] = &[
    ":",
    "[",
    "awk",
    "basename",
    "cat",
    "cut",
    "date",
    "df",
    "dirname",
    "echo",
    "false",
    "free",
    "getopts",
    "grep",
    "hash",
    "head",
    "hostname",
    "id",
    "let",
    "ls",
    "lscpu",
    "mkdir",
    "nproc",
    "nvidia-smi",
    "printenv",
    "printf",
    "pwd",
    "rm",
    "readlink",
    "realpath",
    "scontrol",
    "sed",
    "seq",
    "set",
    "shift",
    "shopt",
    "sinfo",
    "sleep",
    "sort",
    "squeue",
    "tail",
    "tee",
    "test",
    "tr",
    "trap",
    "true",
    "type",
    "ulimit",
    "umask",
    "uname",
    "uniq",
    "wait",
    "wc",
    "which",
    "whoami",
];

/// Commands that change variables, and nothing else.
const VARIABLES: &[&str] = &[
    "declare", "export", "local", "read", "readonly", "typeset", "unset",
];

/// Commands that may change any variable, PATH above all, and no file.
const MODULES: &[&str] = &["conda", "mamba", "micromamba", "ml", "module", "spack"];

/// How deep substitutions within each other are followed.
const INSIDE_MAX: usize = 4;

/// What is found about a program.
const OF_PROGRAMS: &[&str] = &["engine", "libraries", "program"];

/// Stands for what is not known of a word.
const UNKNOWN: &[u8] = b"?";

/// A script, and where it would run.
pub struct Script<'a> {
    pub text: &'a [u8],
    /// What findings call it: `job.sh`.
    pub name: String,
    /// Whether it is one line, of `--wrap`.
    pub wrapped: bool,
    /// The directory in which it starts.
    pub dir: PathBuf,
    /// Whether it has the variables of this process.
    pub exported: bool,
}

/// What findings are judged by.
pub struct Around<'a> {
    /// What the whole job asks for.
    pub request: &'a Request,
    pub config: &'a Config,
    pub store: &'a Store,
    pub submission: bool,
    /// When nothing more is begun.
    pub until: Option<Instant>,
}

/// A line that starts a container.
struct Call {
    line: usize,
    /// Where, if that is known.
    dir: Option<PathBuf>,
    runs: Runs,
    stays: Stays,
    step: bool,
    /// What it asks for beyond the job, with the image unless it is a command line of Apptainer's.
    request: Request,
    /// How many words follow the image; `None` for a command line of Apptainer's, which tells.
    behind: Option<usize>,
    words: Vec<Word>,
}

/// What no line before can have changed since the submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stays {
    images: bool,
    files: bool,
    variables: bool,
}

/// Looks at each container that the script starts; says whether there is one.
pub fn look(script: &Script, around: &Around, found: &mut Findings) -> bool {
    let interpreter = crate::supervise::interpreter(script.text);
    let shell = interpreter
        .iter()
        .filter_map(|word| Path::new(word).file_name()?.to_str())
        .find(|name| *name != "env")
        .is_some_and(|name| SHELLS.contains(&name));
    if !shell {
        found.ok(
            Of::Job,
            "script",
            format!(
                "{} is none of sh or bash, and is not looked into",
                script.name
            ),
        );
        return false;
    }
    let (commands, _) = shellscript::commands(script.text);
    let has_step = |command: &Command| command.words.iter().any(|word| word.start() == b"srun");
    let srun = match commands.iter().any(has_step).then(Srun::ask) {
        Some(Ok(srun)) => srun,
        Some(Err(why)) => {
            log::debug!("steps of the script are not looked at: {why}");
            Srun::default()
        }
        None => Srun::default(),
    };
    let submitted = match std::env::current_dir() {
        Ok(dir) => dir,
        Err(why) => {
            log::debug!("the script is not looked into: {why}");
            return false;
        }
    };
    let mut calls = calls(&commands, &script.dir, &submitted, &srun);
    for call in &mut calls {
        call.stays.variables &= script.exported;
    }
    let lines: Vec<String> = calls.iter().map(|call| call.line.to_string()).collect();
    let text = match &lines[..] {
        [] => format!(
            "{} starts no container that could be seen beforehand",
            script.name
        ),
        [line] => format!("line {line} of {} starts a container", script.name),
        lines => format!(
            "lines {} of {} start containers",
            lines.join(", "),
            script.name
        ),
    };
    found.ok(Of::Job, "script", text);
    let mut seen = HashSet::new();
    let mut told: Vec<(usize, Finding)> = Vec::new();
    for call in &calls {
        if around.until.is_some_and(|until| Instant::now() >= until) {
            log::debug!(
                "from line {} on the script is not looked at: no time",
                call.line
            );
            break;
        }
        // A job's options are read where it was submitted, a line's where the script is.
        let dir = call.dir.as_deref().unwrap_or(&submitted);
        if let Err(why) = std::env::set_current_dir(dir) {
            log::debug!("line {}: {}: {why}", call.line, dir.display());
            continue;
        }
        let mut of_call = Findings::default();
        look_at(call, around, &mut seen, &mut of_call);
        for finding in of_call.0 {
            // Each program is looked at once, and what is found is of that.
            let same = |(_, other): &&mut (usize, Finding)| {
                !OF_PROGRAMS.contains(&finding.about)
                    && (other.about, &other.cause) == (finding.about, &finding.cause)
            };
            match told.iter_mut().find(same) {
                Some(other) if other.1.level < finding.level => *other = (call.line, finding),
                Some(_) => {}
                None => told.push((call.line, finding)),
            }
        }
    }
    if let Err(why) = std::env::set_current_dir(&submitted) {
        log::debug!("cannot go back to {}: {why}", submitted.display());
    }
    for (line, mut finding) in told {
        if finding.is_of_job() || OF_PROGRAMS.contains(&finding.about) {
            finding.cause = match script.wrapped {
                true => format!("--wrap: {}", finding.cause),
                false => format!("line {line} of {}: {}", script.name, finding.cause),
            };
        }
        found.0.push(finding);
    }
    !calls.is_empty()
}

/// Which program in which image was looked at.
type Seen = HashSet<(PathBuf, Vec<OsString>, OsString, Option<String>)>;

fn look_at(call: &Call, around: &Around, seen: &mut Seen, found: &mut Findings) {
    let Around { config, store, .. } = around;
    let mut request = Request {
        line: None,
        image: None,
        ..call.request.clone().or_else(around.request.clone())
    };
    request.image.clone_from(&call.request.image);
    let words: Vec<OsString> = call.words.iter().map(filled).collect();
    let (behind, mut command) = match call.behind {
        Some(behind) => (behind, words[words.len() - behind..].to_vec()),
        None => match command_line::understand(&words, &store.options_memory()) {
            Ok(Understood::Container(line)) => {
                // Of `run` the runscript is no word of the line.
                let from = words.len().checked_sub(line.command.len());
                let named = from.and_then(|from| words.get(from)) == line.command.first();
                let behind = line.command.len() - usize::from(!named);
                (behind, request.in_container(line))
            }
            // It says so itself when it runs.
            Err(why) if why.is_refusal() && call.words.iter().all(Word::is_one) => {
                let cure = "see whether the command runs without checkpoints";
                let level = match config.on_unavailable {
                    OnUnavailable::Run => Warning,
                    OnUnavailable::Fail => call.level(),
                };
                return found.told(level, Of::Job, "program", &why.to_string(), cure);
            }
            // What the program does not take at all is not our matter, nor what runs nothing.
            Ok(Understood::Passthrough | Understood::Foreign) | Err(_) => return,
        },
    };
    // Words behind the image of a shell are ignored.
    let at = match task::shell_of(&request) {
        Some(_) => words
            .iter()
            .rposition(|word| Some(Path::new(word)) == request.image.as_deref()),
        None => words.len().checked_sub(behind + 1),
    };
    let Some(at) = at else {
        return;
    };
    let (before, image) = (&call.words[..at], &call.words[at]);
    if !before.iter().all(Word::is_one) || image.text().is_none() {
        return;
    }
    let Some(image) = &request.image else {
        return;
    };
    if image.is_relative() && call.dir.is_none() {
        return;
    }
    // It may be made before it is needed.
    let missing = image.metadata().is_err() && !image.to_string_lossy().contains("://");
    if missing && (!call.stays.images || call.runs == Runs::Perhaps) {
        return;
    }
    let path = image.canonicalize().unwrap_or_else(|_| image.clone());
    let mut here = Findings::default();
    let last = Last::default();
    let place = containers::place(&request, config, &last, around.submission, store, &mut here);
    let certain = before.iter().all(|word| word.text().is_some()) && call.stays.variables;
    if let Some(place) = place {
        // At a submission the variables are those of a job around it.
        let on_gpus = Some(&place).filter(|_| !around.submission);
        if let Some(why) = on_gpus.and_then(task::on_gpus) {
            here.told(Problem, Of::Job, "gpu", &why, "ask for no GPUs");
        } else if let Some(by) = gpu::asked(&[], request.line.as_ref(), |_| None) {
            let known::Doubt { cause, cure } = known::gpu(&by);
            here.add(Warning, Of::Job, "gpu", cause, cure);
        }
        let shell = task::shell_of(&request);
        let program = call.words.get(at + 1);
        let program = program.filter(|_| command.len() == behind && shell.is_none());
        let known = program.is_none_or(|word| word.text().is_some());
        if command.is_empty() && shell.is_none() {
            command.push(command_line::RUNSCRIPT.into());
        }
        let name = command.first().cloned().unwrap_or_default();
        let mut options: Vec<OsString> = before.iter().map(filled).collect();
        options.extend_from_slice(&request.apptainer_options);
        let new =
            certain && known && seen.insert((path, options, name.clone(), request.engine.clone()));
        if new {
            let mut of_program = Findings::default();
            program_in(&request, around, &place, &command, &mut of_program);
            of_program.0.retain_mut(|finding| {
                // Where it is not there, it may be on a file system that only nodes have, or be made.
                let elsewhere = name.as_bytes().contains(&b'/') && program.is_some();
                if finding.about == "program" && finding.level == Problem {
                    if elsewhere {
                        finding.level = Warning;
                    }
                    let files = call.stays.files || !elsewhere;
                    return call.stays.images && files && call.runs != Runs::Perhaps;
                }
                true
            });
            here.0.append(&mut of_program.0);
        }
    }
    for finding in &mut here.0 {
        if finding.level == Problem && finding.is_of_job() {
            finding.level = call.level();
        }
    }
    found.0.append(&mut here.0);
}

/// Program and engines, in a container that can be started.
fn program_in(
    request: &Request,
    around: &Around,
    place: &crate::container::Place,
    command: &[OsString],
    found: &mut Findings,
) {
    let wanted = match request.engine.as_deref().map(str::parse::<EngineChoice>) {
        None => around.config.engine,
        Some(Ok(wanted)) => wanted,
        // A job's own is told elsewhere.
        Some(Err(_)) => return,
    };
    let Ok((wanted, placement)) = task::placement(request, around.config, place, wanted) else {
        return;
    };
    let asked = Asked {
        config: around.config,
        wanted,
        placement,
        shell: task::shell_of(request),
        submission: around.submission,
    };
    engines::look(
        &asked,
        place,
        command,
        around.store,
        &Last::default(),
        found,
    );
}

/// A word with something in place of what is not known of it.
fn filled(word: &Word) -> OsString {
    word.text().unwrap_or_else(|| {
        let start = [word.start(), UNKNOWN].concat();
        OsString::from_vec(start)
    })
}

impl Call {
    /// How bad it is if the line cannot work.
    fn level(&self) -> Level {
        match (self.runs, self.stays.images) {
            (Runs::Once, true) => Problem,
            _ => Warning,
        }
    }
}

/// Whether a word before Apptainer is a program that becomes it, or an option or variable of such a one.
fn may_become(word: &Word) -> bool {
    let start = word.start();
    let is_list = start
        .iter()
        .all(|byte| byte.is_ascii_digit() || b",:-".contains(byte));
    let program = || {
        wrapper::BECOMING
            .iter()
            .any(|known| start == known.as_bytes())
    };
    start.starts_with(b"-") || is_list || word.assigned().is_some() || program()
}

/// Which of the words, all before it being known, begins a command of Apptainer that runs an
/// application.
fn starts_apptainer(words: &[Word]) -> Option<usize> {
    let texts = words.iter().map_while(Word::text);
    let found = texts.enumerate().find(|(at, text)| {
        let rest: Vec<OsString> = words[at + 1..].iter().map(filled).collect();
        wrapper::is_apptainer(text)
            && rest
                .iter()
                .any(|word| wrapper::ACTIONS.iter().any(|a| word == a))
    });
    found.map(|(at, _)| at)
}

/// What is known while the script is followed.
struct Follower<'a> {
    srun: &'a Srun,
    /// Where the job is submitted.
    submitted: &'a Path,
    dir: Option<PathBuf>,
    stays: Stays,
    functions: Vec<OsString>,
    calls: Vec<Call>,
}

/// The containers that `commands` start, which begin in `dir`, of a job that is submitted in `submitted`.
fn calls(commands: &[Command], dir: &Path, submitted: &Path, srun: &Srun) -> Vec<Call> {
    let mut follower = Follower {
        srun,
        submitted,
        dir: Some(dir.to_path_buf()),
        stays: Stays {
            images: true,
            files: true,
            variables: true,
        },
        functions: Vec::new(),
        calls: Vec::new(),
    };
    for command in commands {
        if !follower.follow(command) {
            break;
        }
    }
    follower.calls
}

impl Follower<'_> {
    /// Takes the next command into account; false if none is run behind it.
    fn follow(&mut self, command: &Command) -> bool {
        if let Some(name) = &command.function {
            self.functions.push(name.clone());
            return true;
        }
        if !is_harmless_inside(command, 0) {
            self.anything();
        }
        self.stays.files &= !command.writes;
        let assigned = command.words.iter().take_while(|w| w.assigned().is_some());
        let (assigned, mut words) = command.words.split_at(assigned.count());
        let counts = assigned.iter().any(counts);
        if words.is_empty() {
            self.stays.variables &= !counts;
            return true;
        }
        let mut last = false;
        loop {
            let Some(name) = words[0].text() else {
                self.anything();
                return true;
            };
            match name.to_str() {
                Some("exec") => last = true,
                // `command -v` runs nothing.
                Some("command") if words.get(1).is_some_and(|w| w.start().starts_with(b"-")) => {
                    return true;
                }
                Some("nohup" | "time" | "command" | "builtin") => {}
                _ => break,
            }
            words = &words[1..];
            if words.is_empty() {
                // `exec >file`
                return true;
            }
        }
        let once = command.runs == Runs::Once && command.in_shell;
        let stays = Stays {
            variables: self.stays.variables && !counts,
            ..self.stays
        };
        if let Some(call) = self.call(command, words, stays) {
            // What runs in a container makes no images, as a rule that holds wherever people have both.
            self.stays.files = false;
            self.calls.extend(call);
            return !(last && once);
        }
        self.other(command, words) && !(last && once)
    }

    /// A command that starts a container, if it is one; without a call if it is of no interest.
    fn call(&self, command: &Command, words: &[Word], stays: Stays) -> Option<Option<Call>> {
        let base = |word: &Word| {
            let text = word.text()?;
            Some(Path::new(&text).file_name()?.to_str()?.to_owned())
        };
        let mut call = Call {
            line: command.line,
            dir: self.dir.clone(),
            runs: command.runs,
            stays,
            step: false,
            request: Request::default(),
            behind: None,
            words: words.to_vec(),
        };
        let known_function = |word: &Word| {
            let text = word.text();
            text.is_some_and(|text| self.functions.contains(&text))
        };
        if known_function(&words[0]) {
            return None;
        }
        if base(&words[0])? == "srun" {
            let step = self.srun.read(&words[1..])?;
            call.step = true;
            call.words = step.command.to_vec();
            if let Some(dir) = step.option("chdir") {
                call.dir = match (dir, &self.dir) {
                    (Some(dir), _) if Path::new(dir).is_absolute() => Some(dir.into()),
                    (Some(dir), Some(outer)) => Some(outer.join(dir)),
                    _ => None,
                };
            }
            call.stays.variables &= step.option("export").is_none();
            let of_ours = |name: &str| step.option(name).map(|value| value.map(String::from));
            for (name, field) in [
                ("container-checkpoint-engine", &mut call.request.engine),
                (
                    "container-checkpoint-placement",
                    &mut call.request.placement,
                ),
            ] {
                match of_ours(name) {
                    Some(None) => call.stays.variables = false,
                    Some(value) => *field = value,
                    None => {}
                }
            }
            let image = self.srun.image_option().and_then(of_ours);
            match image {
                Some(None) => return Some(None),
                Some(Some(image)) => {
                    call.request.image = Some(image.into());
                    call.behind = Some(call.words.len());
                    // So that the image is a word as in the other lines.
                    let image = shellscript::commands(b"image").0.remove(0).words.remove(0);
                    call.words.insert(0, image);
                    return Some(Some(call));
                }
                None => {}
            }
        }
        if let Some(at) = starts_apptainer(&call.words) {
            if call.step {
                return Some(Some(call));
            }
            // Without srun it is caught by its name, also behind what becomes it.
            let caught = !call.words[at].start().contains(&b'/');
            let becomes = call.words[..at].iter().all(may_become);
            call.stays.variables &= call.words[0].start() != b"env";
            call.words.drain(..at);
            return becomes.then_some(caught.then_some(call));
        }
        if base(&call.words[0])? == "container-checkpoint" {
            return ours(call).map(Some);
        }
        None
    }

    /// What any other command changes; false if none is run behind it.
    fn other(&mut self, command: &Command, words: &[Word]) -> bool {
        let once = command.runs == Runs::Once && command.in_shell;
        let name = words[0].text();
        let name = name.as_deref().and_then(OsStr::to_str).unwrap_or_default();
        if self.functions.iter().any(|function| function == name) {
            self.of_shell();
            return true;
        }
        match name {
            "exit" | "return" => return !once,
            // Words that are read from here on may mean something else.
            "alias" => return false,
            "cd" => {
                let to = match words {
                    [_, to] if once && to.variable() == Some("SLURM_SUBMIT_DIR") => {
                        Some(self.submitted.to_path_buf())
                    }
                    [_, to] if once && !to.start().starts_with(b"-") => {
                        to.text().map(PathBuf::from)
                    }
                    _ => None,
                };
                self.dir = match (to, &self.dir) {
                    (Some(to), _) if to.is_absolute() => Some(to),
                    (Some(to), Some(dir)) => Some(dir.join(to)),
                    _ => None,
                };
                // One that does not exist may be made, or `cd` fails and stays.
                self.dir = self.dir.take().filter(|dir| dir.is_dir());
            }
            "pushd" | "popd" => self.dir = None,
            "." | "source" | "eval" => self.of_shell(),
            name if MODULES.contains(&name) => self.stays.variables = false,
            name if VARIABLES.contains(&name) => {
                let may = |word: &Word| word.text().is_none() && word.assigned().is_none();
                let counts = words[1..].iter().any(|word| counts(word) || may(word));
                self.stays.variables &= !counts;
            }
            "sed" | "tee" => self.stays.files = false,
            name if HARMLESS.contains(&name) => {}
            _ => self.anything(),
        }
        true
    }

    /// Any program may make any file.
    fn anything(&mut self) {
        self.stays.images = false;
        self.stays.files = false;
    }

    /// So may what the shell itself runs, and change everything else.
    fn of_shell(&mut self) {
        self.anything();
        self.stays.variables = false;
        self.dir = None;
    }
}

/// Whether what runs inside a command makes no images or programs.
fn is_harmless_inside(command: &Command, depth: usize) -> bool {
    let is_harmless = |script: &Vec<u8>| {
        let (commands, whole) = shellscript::commands(script);
        let is_harmless = |command: &Command| {
            let mut words = command
                .words
                .iter()
                .filter(|word| word.assigned().is_none());
            let name = words.next().map(|word| word.text().unwrap_or_default());
            let known = |name: OsString| HARMLESS.iter().any(|known| name == *known);
            name.is_none_or(known) && is_harmless_inside(command, depth + 1)
        };
        whole && commands.iter().all(is_harmless)
    };
    !command.opaque && depth < INSIDE_MAX && command.inside.iter().all(is_harmless)
}

/// Whether a word that names or sets a variable is about one that counts for containers.
fn counts(word: &Word) -> bool {
    let name = word.start();
    let end = name.iter().position(|byte| matches!(byte, b'=' | b'+'));
    let name = &name[..end.unwrap_or(name.len())];
    name == b"PATH"
        || [&b"APPTAINER"[..], b"SINGULARITY", b"CONTAINER_CHECKPOINT"]
            .iter()
            .any(|start| name.starts_with(start))
}

/// A line `container-checkpoint run …`; `None` if it is another command, or its options are not clear.
fn ours(mut call: Call) -> Option<Call> {
    let words: Vec<OsString> = call.words.iter().map(filled).collect();
    let Subcommand::Run(run) = Cli::try_parse_from(&words).ok()?.command else {
        return None;
    };
    let rest = run.words.len();
    let runscript = run.runscript;
    // What runs then is not looked at.
    call.stays.variables &= !run.startscript;
    let (request, command) = Request::of_run(run, &words).ok()?;
    let at = call.words.len().checked_sub(rest)?;
    if !call.words[..at].iter().all(Word::is_one) {
        return None;
    }
    // Of its options these are about the container; its own configuration would have to be read, too.
    let of_engine = [&request.engine, &request.placement].into_iter().flatten();
    let mut options: Vec<OsString> = of_engine.map(OsString::from).collect();
    options.extend_from_slice(&request.apptainer_options);
    let known = |option: &OsString| !option.as_bytes().ends_with(UNKNOWN);
    call.stays.variables &= request.config.is_none() && options.iter().all(known);
    call.words.drain(..at);
    if request.image.is_some() {
        if runscript {
            call.words.truncate(1);
        }
        call.behind = Some(call.words.len() - 1);
    } else if !command
        .first()
        .is_some_and(|word| wrapper::is_apptainer(word))
    {
        return None;
    }
    call.step = true;
    call.request = Request {
        engine: request.engine,
        placement: request.placement,
        image: request.image,
        apptainer_options: request.apptainer_options,
        ..Request::default()
    };
    Some(call)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Slurm prints it.
    const HELP: &str = "  -D, --chdir=path            change remote current working directory
      --export=env_vars|NONE  environment variables passed to launcher
  -n, --ntasks=ntasks         number of tasks to run
      --container-checkpoint-engine=ENGINE
                              what saves and restores processes
      --container-image=IMAGE with --container-checkpoint: run in this
                              container, a SIF file or a sandbox directory of
                              Apptainer
";

    /// Each call as a line: where it is, in which directory it runs, what of images, files and
    /// variables stays as it is, and its words.
    fn told(text: &str) -> Vec<String> {
        let (commands, _) = shellscript::commands(text.as_bytes());
        let srun = Srun::parse(HELP);
        let calls = calls(&commands, Path::new("/"), Path::new("/usr"), &srun);
        let shown = |call: &Call| {
            let runs = match call.runs {
                Runs::Once => "",
                Runs::Repeatedly => "+",
                Runs::Perhaps => "?",
            };
            let dir = call
                .dir
                .as_ref()
                .map_or("-".into(), |dir| dir.display().to_string());
            let mut text = format!("{}{runs} {dir} ", call.line);
            for (stays, letter) in [
                (call.stays.images, 'i'),
                (call.stays.files, 'f'),
                (call.stays.variables, 'v'),
            ] {
                text.push(if stays { letter } else { '-' });
            }
            if let Some(image) = &call.request.image {
                text += &format!(" [{}]", image.display());
            }
            if let Some(engine) = &call.request.engine {
                text += &format!(" ({engine})");
            }
            let words = call
                .words
                .iter()
                .map(|word| filled(word).display().to_string());
            text + " " + &words.collect::<Vec<_>>().join(" ")
        };
        calls.iter().map(shown).collect()
    }

    #[test]
    fn containers_are_found_however_they_are_started() {
        for (script, expected) in [
            (
                "apptainer exec a.sif b $C",
                "1 / ifv apptainer exec a.sif b ?",
            ),
            (
                "exec singularity -q run a.sif",
                "1 / ifv singularity -q run a.sif",
            ),
            (
                "srun -n 2 /opt/apptainer exec a.sif b",
                "1 / ifv /opt/apptainer exec a.sif b",
            ),
            (
                "time srun --chdir=etc --container-image a.sif b c",
                "1 /etc ifv [a.sif] image b c",
            ),
            (
                "srun --container-checkpoint-engine=criu apptainer run a.sif",
                "1 / ifv (criu) apptainer run a.sif",
            ),
            (
                "srun --export=A=b apptainer run a.sif",
                "1 / if- apptainer run a.sif",
            ),
            (
                "container-checkpoint run --name n --engine criu a.sif b -x",
                "1 / ifv [a.sif] (criu) a.sif b -x",
            ),
            ("srun ~/bin/container-checkpoint run --name n a.sif", ""),
            (
                "srun /bin/container-checkpoint run --name $SLURM_JOB_ID -- apptainer exec a.sif b",
                "1 / ifv apptainer exec a.sif b",
            ),
            (
                "A=b APPTAINER_BIND=/x apptainer exec a.sif b",
                "1 / if- apptainer exec a.sif b",
            ),
        ] {
            let found = told(script);
            assert_eq!(found.join("\n"), expected, "{script}");
        }
        for none in [
            "/usr/bin/apptainer exec a.sif b",
            "apptainer pull a.sif docker://b",
            "srun --container-image=$A b",
            "srun $OPTIONS apptainer exec a.sif b",
            "$A apptainer exec a.sif b",
            "container-checkpoint run --name n -- ./prog",
            "container-checkpoint create n",
            "mpirun apptainer exec a.sif b",
            "env A=b mpirun apptainer exec a.sif b | timeout 9 apptainer exec a.sif b",
            "echo apptainer exec a.sif b",
            "apptainer() { :; }; apptainer exec a.sif b",
            "alias apptainer=x\napptainer exec a.sif b",
            "exit\napptainer exec a.sif b",
            "exec a\napptainer exec a.sif b",
        ] {
            assert_eq!(told(none), [""; 0], "{none}");
        }
    }

    /// What is before `apptainer run a.sif`, and what is known of that then.
    #[test]
    fn what_comes_before_may_change_what_is_there() {
        for (before, expected) in [
            ("", "/ ifv"),
            (
                "set -e; echo $A; A=$B; export C=d; B=$((1 + 2)); [ -f x ] || exit 1",
                "/ ifv",
            ),
            (
                "command -v apptainer || { echo no; exit 1; }; exec 2>&1",
                "/ ifv",
            ),
            ("echo x 2>&1 <a; sort", "/ ifv"),
            ("cat <<E >run.sh\nx\nE", "/ i-v"),
            ("ls | tee list", "/ i-v"),
            ("make", "/ --v"),
            ("A=$(make)", "/ --v"),
            ("A=$(ls | head -n `echo $(make)`)", "/ --v"),
            (
                "A=$(ls | head -n `nproc` | sed s/a/b/); echo \"$(date; pwd) $((1 + $(id -u)))\"",
                "/ ifv",
            ),
            ("if [ -f b ]; then make; fi", "/ --v"),
            ("case $A in b) make;; esac", "/ --v"),
            ("apptainer pull a.sif docker://b", "/ --v"),
            ("srun ./make", "/ --v"),
            ("srun apptainer exec b.sif make", "/ i-v"),
            ("module load apptainer", "/ if-"),
            ("export PATH=x:$PATH", "/ if-"),
            ("export $(cat b)", "/ if-"),
            ("unset SINGULARITY_BIND", "/ if-"),
            ("source b", "- ---"),
            ("f() { make; }", "/ --v"),
            ("f() { echo; }; f", "- ---"),
            ("cd etc", "/etc ifv"),
            ("cd /usr && cd bin", "- ifv"),
            ("cd $SLURM_SUBMIT_DIR", "/usr ifv"),
            ("cd \"${SLURM_SUBMIT_DIR}\"; cd bin", "/usr/bin ifv"),
            ("cd $HOME", "- ifv"),
            ("cd no-such-directory", "- ifv"),
            ("cd", "- ifv"),
            ("(cd etc)", "- ifv"),
            ("cd etc | sort", "- ifv"),
            ("pushd etc", "- ifv"),
            ("return 0 & alias_b", "/ --v"),
        ] {
            let found = told(&format!("{before}\napptainer run a.sif"));
            let found = found.last().map_or("", String::as_str);
            let line = before.matches('\n').count() + 2;
            let expected = format!("{line} {expected} apptainer run a.sif");
            assert_eq!(found, expected, "{before}");
        }
    }
}
