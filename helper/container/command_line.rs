//! Command lines that people have already: `apptainer [OPTIONS] exec|run|shell [OPTIONS] IMAGE COMMAND…`.
//!
//! Contract: [`understand`] finds the options, the image and the command in such a line exactly as
//! the program itself would, and refuses by name what cannot be kept resumable. It starts nothing
//! but `PROGRAM help …` and `PROGRAM … --help`. What people write before such a line is found by
//! [`wrapper`].
//!
//! Which options there are and which of them take a value differs between versions, so the
//! installed program is asked: its help lists most, and an option that it does not list (`--pwd`,
//! `--underlay` in 1.4) is tried before `--help`. Both Apptainer and SingularityCE are made with the
//! same libraries (cobra and pflag), whose output is what is read here. What was learnt of a program
//! is remembered in a file of the caller's, and counts as long as its path, size and time of change
//! stay.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde::{Deserialize, Serialize};

use super::shell_action::Shell;
use super::wrapper::{self, ACTIONS, Environment, Unwrapped, WrapperError};

/// Most programs that are remembered; the oldest goes first.
const REMEMBERED: usize = 8;
/// Largest memory that is read, in bytes.
const MEMORY_CAP: u64 = 1 << 20;

/// What `apptainer run` runs (action_script.sh of Apptainer 1.2 to 1.5).
pub const RUNSCRIPT: &str = "/.singularity.d/runscript";

/// Options that cannot be kept, by their long names, and why.
const REFUSED: &[(&str, &str)] = &[
    (
        "sharens",
        "the container would be another process's, and end with it; leave it out",
    ),
    (
        "passphrase",
        "it asks at a terminal at every start; give the key by --pem-path, or the passphrase by \
         APPTAINER_ENCRYPTION_PASSPHRASE",
    ),
    (
        "oci",
        "such containers are run by another program, in which neither engine can work; use a SIF \
         image without it",
    ),
    (
        "vm",
        "nothing inside a virtual machine can be saved; leave it out",
    ),
    (
        "syos",
        "such a shell is in a virtual machine, inside which nothing can be saved; leave it out",
    ),
];

#[derive(Debug, thiserror::Error)]
pub enum CommandLineError {
    #[error("{program} is not in PATH on this node")]
    NotFound { program: String },
    #[error("cannot ask {} for its options: {why}", program.display())]
    Help { program: PathBuf, why: String },
    #[error("{command} has no option {option}: {said}")]
    Unknown {
        command: String,
        option: String,
        said: String,
    },
    #[error("the option {option} of {command} needs a value")]
    NoValue { command: String, option: String },
    #[error("{command} needs {what}; see `{command} --help`")]
    Incomplete { command: String, what: &'static str },
    #[error("the option --{option} of {command} cannot be combined with checkpoints: {why}")]
    Refused {
        command: String,
        option: &'static str,
        why: &'static str,
    },
    #[error(
        "the option --{option} of {command} cannot be combined with checkpoints: {what} is started by \
         `exec`, which has no such option; leave it out"
    )]
    NotOfExec {
        command: String,
        option: String,
        what: &'static str,
    },
    #[error(transparent)]
    Wrapper(#[from] WrapperError),
}

impl CommandLineError {
    /// Whether the line is one that runs, only not under a checkpoint.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            CommandLineError::Refused { .. }
                | CommandLineError::NotOfExec { .. }
                | CommandLineError::Wrapper(_)
        )
    }
}

/// What a command line means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Understood {
    /// It runs an application in a container.
    Container(Line),
    /// It is of Apptainer but runs no application in the foreground: `pull`, `inspect`,
    /// `instance start`, `--version`… Nothing is to be saved.
    Passthrough,
    /// It is not of Apptainer.
    Foreign,
}

/// An application in a container, as a command line says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The words before it, such as `nice -n 5`, which become it.
    pub prefix: Vec<OsString>,
    /// The program as found in PATH.
    pub program: PathBuf,
    /// Options before the subcommand.
    pub globals: Vec<OsString>,
    /// Options for `exec`, in their order.
    pub options: Vec<OsString>,
    /// The long names of options that are on, by the line or by a variable of Apptainer's.
    pub flags: BTreeSet<String>,
    /// As it is written: a path, or an address.
    pub image: PathBuf,
    /// What runs inside; of `run`, the runscript with its arguments. Not empty, but for `shell`.
    pub command: Vec<OsString>,
    /// Of `shell`, what says which one: the command is found out inside.
    pub shell: Option<Shell>,
}

/// Understands `argv`. `memory` is the file in which programs' options are remembered; one that
/// cannot be read or written costs time only.
pub fn understand(argv: &[OsString], memory: &Path) -> Result<Understood, CommandLineError> {
    let Some(Unwrapped {
        prefix,
        argv,
        environment,
    }) = wrapper::unwrapped(argv)?
    else {
        return Ok(Understood::Foreign);
    };
    let Some((name, words)) = argv.split_first() else {
        return Ok(Understood::Foreign);
    };
    let search = environment.get("PATH");
    let program = find_in(name, search.as_deref()).ok_or_else(|| CommandLineError::NotFound {
        program: name.display().to_string(),
    })?;
    let mut grammar = Grammar::of(&program, memory)?;
    grammar.environment = environment;
    let line = grammar.read(name, words);
    grammar.remember();
    Ok(match line? {
        Understood::Container(line) => Understood::Container(Line { prefix, ..line }),
        other => other,
    })
}

/// The program that a shell would run for `name`, this helper under that name left out.
pub fn find(name: &OsStr) -> Option<PathBuf> {
    find_in(name, std::env::var_os("PATH").as_deref())
}

/// The same with `search` as PATH.
fn find_in(name: &OsStr, search: Option<&OsStr>) -> Option<PathBuf> {
    let ourselves = std::env::current_exe().ok();
    let runs = |path: &PathBuf| {
        nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
            && path.is_file()
            && path.canonicalize().ok() != ourselves
    };
    if name.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(name)).filter(runs);
    }
    std::env::split_paths(search?)
        .map(|dir| dir.join(name))
        .find(runs)
}

/// One option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Flag {
    /// The long name.
    name: String,
    short: Option<char>,
    /// Whether the next word is its value if it has none behind a `=`.
    value: bool,
}

/// The options of a program.
#[derive(Debug)]
struct Grammar<'a> {
    known: Known,
    environment: Environment,
    memory: &'a Path,
    changed: bool,
}

/// What is remembered of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    program: PathBuf,
    size: u64,
    /// Times of the last change of contents and of the inode, in s and ns since 1970.
    changed: [i64; 4],
    /// By subcommand; those of the program itself under an empty name.
    options: BTreeMap<String, Vec<Flag>>,
}

/// An option as it is given.
struct Given {
    flag: Flag,
    value: Option<OsString>,
}

impl Grammar<'_> {
    fn of<'a>(program: &Path, memory: &'a Path) -> Result<Grammar<'a>, CommandLineError> {
        let about = fs::metadata(program).map_err(|why| CommandLineError::Help {
            program: program.into(),
            why: why.to_string(),
        })?;
        let now = Known {
            program: program.into(),
            size: about.size(),
            changed: [
                about.mtime(),
                about.mtime_nsec(),
                about.ctime(),
                about.ctime_nsec(),
            ],
            options: BTreeMap::new(),
        };
        let same = |known: &Known| {
            (&known.program, known.size, known.changed) == (&now.program, now.size, now.changed)
        };
        let known = recall(memory).into_iter().find(same);
        Ok(Grammar {
            known: known.unwrap_or(now),
            environment: Environment::default(),
            memory,
            changed: false,
        })
    }

    /// Reads the words behind `name`.
    fn read(&mut self, name: &OsStr, words: &[OsString]) -> Result<Understood, CommandLineError> {
        let program = Path::new(name).file_name().unwrap_or(name);
        let program = program.to_string_lossy().into_owned();
        let (given, globals, rest) = self.options("", &program, words)?;
        if given.iter().any(|given| is_information(&given.flag)) {
            return Ok(Understood::Passthrough);
        }
        let Some((action, words)) = rest.split_first() else {
            return Ok(Understood::Passthrough);
        };
        let Some(action) = ACTIONS.into_iter().find(|known| action == known) else {
            return Ok(Understood::Passthrough);
        };
        let command = format!("{program} {action}");
        let (given, options, rest) = self.options(action, &command, words)?;
        if given.iter().any(|given| is_information(&given.flag)) {
            return Ok(Understood::Passthrough);
        }
        let mut flags = self.by_variables(action)?;
        for Given { flag, value } in &given {
            match value {
                Some(value) if !flag.value && is_false(value) => flags.remove(&flag.name),
                _ => flags.insert(flag.name.clone()),
            };
        }
        if let Some((option, why)) = REFUSED.iter().find(|(option, _)| flags.contains(*option)) {
            return Err(CommandLineError::Refused {
                command,
                option,
                why,
            });
        }
        // They become `exec`.
        let what = match action {
            "run" => Some("the runscript"),
            "shell" => Some("the shell"),
            _ => None,
        };
        for Given { flag, .. } in &given {
            let (Some(what), false) = (what, is_shell(action, flag)) else {
                continue;
            };
            match self.flag("exec", &command, &format!("--{}", flag.name)) {
                Err(CommandLineError::Unknown { .. }) => {
                    return Err(CommandLineError::NotOfExec {
                        command,
                        option: flag.name.clone(),
                        what,
                    });
                }
                other => drop(other?),
            }
        }
        let mounts = given.iter().filter(|given| given.flag.name == "no-mount");
        let mut mounts = mounts.filter_map(|given| given.value.as_ref());
        if mounts.any(|value| value.as_bytes().split(|b| *b == b',').any(|m| m == b"proc")) {
            return Err(CommandLineError::Refused {
                command,
                option: "no-mount proc",
                why: "no engine works without /proc; leave proc out of it",
            });
        }
        let incomplete = |what| CommandLineError::Incomplete {
            command: command.clone(),
            what,
        };
        let (image, words) = rest.split_first().ok_or(incomplete("a container image"))?;
        let inside = match action {
            "run" => {
                let app = given.iter().rfind(|given| given.flag.name == "app");
                let app = app.and_then(|given| given.value.clone()).or_else(|| {
                    variables("APP")
                        .chain(variables("APPNAME"))
                        .find_map(|name| self.environment.get(&name))
                });
                let mut inside = vec![runscript(app)];
                inside.extend_from_slice(words);
                inside
            }
            "shell" => {
                if let Some(first) = words.first() {
                    log::warn!(
                        "{command} ignores what follows the image ({} …), here and everywhere; a command \
                         is run by `{program} exec {} COMMAND…`",
                        first.display(),
                        image.display()
                    );
                }
                Vec::new()
            }
            _ if words.is_empty() => return Err(incomplete("a command to run in the container")),
            _ => words.to_vec(),
        };
        let shell = (action == "shell").then(|| Shell {
            wanted: self.shell(&given),
        });
        let options = match shell {
            Some(_) => without_shell(&given),
            None => options,
        };
        Ok(Understood::Container(Line {
            prefix: Vec::new(),
            program: self.known.program.clone(),
            globals,
            options,
            flags,
            image: image.into(),
            command: inside,
            shell,
        }))
    }

    /// The shell that the options of `shell` ask for, else a variable.
    fn shell(&self, given: &[Given]) -> Option<OsString> {
        let option = given.iter().rfind(|given| is_shell("shell", &given.flag));
        let wanted = match option {
            Some(given) => given.value.clone(),
            None => variables("SHELL").find_map(|name| self.environment.get(&name)),
        };
        wanted.filter(|shell| !shell.is_empty())
    }

    /// Reads the options that `words` begin with, as pflag does without interspersed options: what
    /// they are, the words that are of them, and the words that follow.
    #[allow(clippy::type_complexity)]
    fn options<'w>(
        &mut self,
        action: &str,
        command: &str,
        words: &'w [OsString],
    ) -> Result<(Vec<Given>, Vec<OsString>, &'w [OsString]), CommandLineError> {
        let mut given = Vec::new();
        let mut at = 0;
        while let Some(word) = words.get(at) {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                return Ok((given, words[..at].to_vec(), &words[at + 1..]));
            }
            if bytes == b"-" || !bytes.starts_with(b"-") {
                break;
            }
            at += 1;
            // The option whose value is still to come, as it is written.
            let mut open: Option<(Flag, String)> = None;
            if let Some(long) = bytes.strip_prefix(b"--") {
                let (name, value) = split(long);
                let shown = format!("--{}", String::from_utf8_lossy(name));
                let flag = self.flag(action, command, &shown)?;
                match value {
                    None if flag.value => open = Some((flag, shown)),
                    value => given.push(Given {
                        flag,
                        value: value.map(OsString::from),
                    }),
                }
            } else {
                let mut letters = &bytes[1..];
                while let Some((letter, rest)) = letters.split_first() {
                    let shown = format!("-{}", char::from(*letter));
                    let flag = self.flag(action, command, &shown)?;
                    let value = match rest.strip_prefix(b"=") {
                        Some(value) if !value.is_empty() => Some(value),
                        _ if flag.value && !rest.is_empty() => Some(rest),
                        _ => None,
                    };
                    letters = if value.is_some() { b"" } else { rest };
                    if value.is_none() && flag.value {
                        open = Some((flag, shown));
                        break;
                    }
                    let value = value.map(|value| OsStr::from_bytes(value).to_owned());
                    given.push(Given { flag, value });
                }
            }
            if let Some((flag, option)) = open {
                let value = words.get(at).ok_or_else(|| CommandLineError::NoValue {
                    command: command.to_owned(),
                    option,
                })?;
                at += 1;
                given.push(Given {
                    flag,
                    value: Some(value.clone()),
                });
            }
        }
        Ok((given, words[..at].to_vec(), &words[at..]))
    }

    /// The option that is written as `shown`, `--name` or `-n`.
    fn flag(&mut self, action: &str, command: &str, shown: &str) -> Result<Flag, CommandLineError> {
        let flags = self.flags(action)?;
        let is_it = |flag: &&Flag| match shown.strip_prefix("--") {
            Some(name) => flag.name == name,
            None => flag.short.is_some_and(|short| shown == format!("-{short}")),
        };
        if let Some(flag) = flags.iter().find(is_it) {
            return Ok(flag.clone());
        }
        let unlisted = match shown.strip_prefix("--") {
            Some(name) => self.try_out(action, name)?,
            // An option that is not listed has no letter in any version.
            None => Err("its help does not list it".to_owned()),
        };
        let flag = unlisted.map_err(|said| CommandLineError::Unknown {
            command: command.to_owned(),
            option: shown.to_owned(),
            said,
        })?;
        let flags = self.known.options.entry(action.to_owned()).or_default();
        flags.push(flag.clone());
        self.changed = true;
        Ok(flag)
    }

    /// The options of a subcommand, of the program itself if that is empty.
    fn flags(&mut self, action: &str) -> Result<&[Flag], CommandLineError> {
        if !self.known.options.contains_key(action) {
            let out = self.run(&["help", action])?;
            let flags = listed(&String::from_utf8_lossy(&out.stdout));
            if flags.is_empty() {
                return Err(self.unclear(&format!("`help {action}` lists no options"), &out));
            }
            self.known.options.insert(action.to_owned(), flags);
            self.changed = true;
        }
        Ok(&self.known.options[action])
    }

    /// Finds out about an option that the help does not list: whether it is there, and whether it
    /// swallows a `--help` behind it. The inner error is what the program says of an unknown one.
    fn try_out(&self, action: &str, name: &str) -> Result<Result<Flag, String>, CommandLineError> {
        let option = format!("--{name}");
        let out = match action {
            // The value of a global option may be used before the line is complete.
            "" => self.run(&[&format!("{option}=x"), "--help"])?,
            _ => self.run(&[action, &option, "--help"])?,
        };
        let said = String::from_utf8_lossy(&out.stderr);
        let unknown = said.lines().find(|line| {
            ["unknown flag", "unknown shorthand flag", "bad flag syntax"]
                .iter()
                .any(|what| line.contains(what))
        });
        Ok(match unknown {
            Some(line) => Err(line.trim().to_owned()),
            None => Ok(Flag {
                name: name.to_owned(),
                short: None,
                value: !out.status.success(),
            }),
        })
    }

    /// The long names of options that Apptainer takes as given because of a variable:
    /// `APPTAINER_NO_HOME=1` is `--no-home`.
    fn by_variables(&mut self, action: &str) -> Result<BTreeSet<String>, CommandLineError> {
        let flags = self.flags(action)?.to_vec();
        let environment = &self.environment;
        let set = |flag: &&Flag| {
            let key = flag.name.to_uppercase().replace('-', "_");
            // Namespaces have names of their own.
            let namespace = format!("UNSHARE_{key}");
            let mut names = variables(&key).chain(variables(&namespace));
            names.any(|name| {
                environment
                    .get(&name)
                    .is_some_and(|value| !value.is_empty() && (flag.value || !is_false(&value)))
            })
        };
        let flags = flags.iter().filter(set);
        Ok(flags.map(|flag| flag.name.clone()).collect())
    }

    /// Runs the program for what it says.
    fn run(&self, words: &[&str]) -> Result<Output, CommandLineError> {
        Command::new(&self.known.program)
            .args(words.iter().filter(|word| !word.is_empty()))
            .stdin(Stdio::null())
            .output()
            .map_err(|why| CommandLineError::Help {
                program: self.known.program.clone(),
                why: why.to_string(),
            })
    }

    fn unclear(&self, what: &str, out: &Output) -> CommandLineError {
        let said = String::from_utf8_lossy(&out.stderr);
        let why = match said.trim() {
            "" => format!("{what} ({})", out.status),
            said => format!("{what}: {said}"),
        };
        CommandLineError::Help {
            program: self.known.program.clone(),
            why,
        }
    }

    /// Writes what was learnt. The memory is replaced in one step, so that others never read half
    /// of one.
    fn remember(&self) {
        if !self.changed {
            return;
        }
        let mut all = recall(self.memory);
        all.retain(|known| known.program != self.known.program);
        all.push(self.known.clone());
        let surplus = all.len().saturating_sub(REMEMBERED);
        all.drain(..surplus);
        let write = || -> io::Result<()> {
            let dir = self.memory.parent().unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            serde_json::to_writer(&mut file, &all)?;
            file.flush()?;
            file.persist(self.memory).map_err(|error| error.error)?;
            Ok(())
        };
        if let Err(why) = write() {
            log::warn!(
                "could not write {}: {why}; {} will be asked for its options again",
                self.memory.display(),
                self.known.program.display()
            );
        }
    }
}

fn recall(memory: &Path) -> Vec<Known> {
    let mut bytes = Vec::new();
    let parsed = fs::File::open(memory)
        .and_then(|file| file.take(MEMORY_CAP).read_to_end(&mut bytes))
        .and_then(|_| serde_json::from_slice(&bytes).map_err(io::Error::from));
    parsed.unwrap_or_else(|why| {
        if why.kind() != io::ErrorKind::NotFound {
            log::warn!("could not read {}: {why}; asking again", memory.display());
        }
        Vec::new()
    })
}

/// The options in a help text. pflag writes each as `  -s, --name type   what it does`, or with six
/// spaces and no letter; no type means a switch, and `type[=x]` a value that only a `=` gives
/// (pflag's FlagUsagesWrapped). What it does goes on below, further to the right.
fn listed(help: &str) -> Vec<Flag> {
    help.lines()
        .filter_map(|line| {
            let (short, rest) = match line.strip_prefix("      --") {
                Some(rest) => (None, rest),
                None => {
                    let (letter, rest) = line.strip_prefix("  -")?.split_once(", --")?;
                    let mut letters = letter.chars();
                    (letters.next().filter(|_| letters.next().is_none()), rest)
                }
            };
            let column = rest.split("  ").next().unwrap_or_default().trim_end();
            let (name, kind) = column.split_once(' ').unwrap_or((column, ""));
            // `--name[=x]` is a switch with another meaning than true.
            let name = name.split('[').next().unwrap_or_default();
            (!name.is_empty()).then(|| Flag {
                name: name.to_owned(),
                short,
                value: !kind.is_empty() && !kind.contains("[="),
            })
        })
        .collect()
}

/// Options that have the program tell something and run nothing.
fn is_information(flag: &Flag) -> bool {
    flag.name == "help" || flag.name == "version"
}

/// The option of `shell` that `exec` lacks, and needs not.
fn is_shell(action: &str, flag: &Flag) -> bool {
    action == "shell" && flag.name == "shell"
}

/// The options of `shell` for `exec`.
fn without_shell(given: &[Given]) -> Vec<OsString> {
    let others = given.iter().filter(|given| !is_shell("shell", &given.flag));
    others
        .map(|Given { flag, value }| {
            let mut word = OsString::from(format!("--{}", flag.name));
            if let Some(value) = value {
                word.push("=");
                word.push(value);
            }
            word
        })
        .collect()
}

/// The script that `run` runs: the image's, or that of one of its apps.
fn runscript(app: Option<OsString>) -> OsString {
    match app.filter(|app| !app.is_empty()) {
        Some(app) => Path::new("/scif/apps")
            .join(app)
            .join("scif/runscript")
            .into(),
        None => RUNSCRIPT.into(),
    }
}

/// The variables by which the option of `key` can be given.
fn variables(key: &str) -> impl Iterator<Item = String> {
    ["APPTAINER_", "SINGULARITY_"]
        .into_iter()
        .map(move |prefix| format!("{prefix}{key}"))
}

/// Whether Go's strconv.ParseBool takes it for false.
fn is_false(value: &OsStr) -> bool {
    matches!(
        value.as_bytes(),
        b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False"
    )
}

fn split(word: &[u8]) -> (&[u8], Option<&OsStr>) {
    match word.iter().position(|byte| *byte == b'=') {
        Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]))),
        None => (word, None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A part of what Apptainer 1.4.5 prints.
    const EXEC: &str = "\
Run a command within a container

Usage:
  apptainer exec [exec options...] <container> <command>

Options:
      --add-caps string               a comma separated capability list to add
      --app string                    set an application to run inside a
                                      container
  -B, --bind stringArray              a user-bind path specification. 
                                      spec has the format
                                      src[:dest[:opts]], where src and
      --blkio-weight int              Block IO relative weight in range
                                      10-1000, 0 to disable
      --blkio-weight-device strings   Device specific block IO relative weight
  -e, --cleanenv                      clean environment before running
                                      container
  -c, --contain                       use minimal /dev and empty other
                                      directories (e.g. /tmp and $HOME)
      --env stringToString            pass environment variable to
                                      contained process (default [])
      --fusemount strings             A FUSE filesystem mount
                                      - where <type> is 'container' or
                                      --no-such thing
  -h, --help                          help for exec
      --no-mount strings              disable one or more 'mount xxx'
      --nv                            enable Nvidia support
      --oom-kill-disable              Disable OOM killer
      --sharens                       share the namespace and image
      --unsquash                      Convert SIF file to temporary


Examples:
  $ apptainer exec /tmp/debian.sif cat /etc/debian_version
";

    /// Its global ones.
    const GLOBAL: &str = "\
Options:
  -c, --config string   specify a configuration file (for root or
                        unprivileged installation only)
  -d, --debug           print debugging information (highest verbosity)
  -h, --help            help for apptainer
  -q, --quiet           suppress normal output
      --version         version for apptainer

Available Commands:
  build       Build an Apptainer image
";

    /// A program that answers as Apptainer does, and counts how often it is asked.
    struct Fake {
        dir: tempfile::TempDir,
    }

    impl Fake {
        fn new() -> Fake {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("apptainer");
            let text = format!(
                "#!/bin/sh\necho x >>'{}'\ncase \"$*\" in\n\
                 'help exec') cat <<'END'\n{EXEC}END\n;;\n\
                 'help shell') cat <<'END'\n{EXEC}  -s, --shell string   which\n      --syos   in a machine\nEND\n;;\n\
                 'help run') cat <<'END'\n{EXEC}      --runscript-timeout string   kill it\nEND\n;;\n\
                 help) cat <<'END'\n{GLOBAL}END\n;;\n\
                 'exec --underlay --help') ;;\n\
                 'exec --pwd --help'|'run --pwd --help') echo 'Error: requires at least 2 arg(s)' >&2; exit 1;;\n\
                 *) echo \"Error for command: unknown flag: $2\" >&2; exit 1;;\nesac\n",
                dir.path().join("asked").display()
            );
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            Fake { dir }
        }

        fn asked(&self) -> usize {
            let text = fs::read_to_string(self.dir.path().join("asked")).unwrap_or_default();
            text.lines().count()
        }

        fn understand(&self, words: &str) -> Result<Understood, CommandLineError> {
            let mut argv = vec![OsString::from(self.dir.path().join("apptainer"))];
            argv.extend(words.split_whitespace().map(OsString::from));
            understand(&argv, &self.dir.path().join("memory"))
        }

        fn line(&self, words: &str) -> Line {
            match self.understand(words) {
                Ok(Understood::Container(line)) => line,
                other => panic!("{words}: {other:?}"),
            }
        }

        fn refused(&self, words: &str) -> String {
            self.understand(words).unwrap_err().to_string()
        }
    }

    fn joined(words: &[OsString]) -> String {
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn options_are_read_from_a_help_text() {
        let flags = listed(EXEC);
        let with_value: Vec<&str> = flags
            .iter()
            .filter(|flag| flag.value)
            .map(|flag| flag.name.as_str())
            .collect();
        assert_eq!(
            with_value,
            [
                "add-caps",
                "app",
                "bind",
                "blkio-weight",
                "blkio-weight-device",
                "env",
                "fusemount",
                "no-mount"
            ]
        );
        let letters: String = flags.iter().filter_map(|flag| flag.short).collect();
        assert_eq!(letters, "Bech");
        assert_eq!(flags.len(), 15);
    }

    /// The options of `exec` of other versions, as their sources have pflag print them, without what
    /// they do.
    const VERSIONS: &[(&str, &str, usize)] = &[
        (
            "Apptainer 1.2.5",
            include_str!("help/apptainer-1.2.5.txt"),
            67,
        ),
        (
            "Apptainer 1.3.6",
            include_str!("help/apptainer-1.3.6.txt"),
            63,
        ),
        (
            "Apptainer 1.4.5",
            include_str!("help/apptainer-1.4.5.txt"),
            65,
        ),
        (
            "Apptainer 1.5.3",
            include_str!("help/apptainer-1.5.3.txt"),
            69,
        ),
        (
            "SingularityCE 4.0.3",
            include_str!("help/singularity-ce-4.0.3.txt"),
            69,
        ),
        (
            "SingularityCE 4.5.1",
            include_str!("help/singularity-ce-4.5.1.txt"),
            73,
        ),
    ];

    /// Those of them that take no value.
    const SWITCHES: &str = "allow-setuid cleanenv compat contain containall disable-cache \
        docker-login fakeroot help intel-hpu ipc keep-layers keep-privs net no-compat no-eval \
        no-home no-https no-init no-oci no-pid no-privs no-setgroups no-tmp-sandbox no-umask nv \
        nvccli oci oom-kill-disable passphrase pid rocm sharens sif-fuse tmp-sandbox underlay \
        unsquash userns uts vm vm-err writable writable-tmpfs";

    #[test]
    fn all_options_of_all_versions() {
        for (version, help, count) in VERSIONS {
            let flags = listed(help);
            assert_eq!(flags.len(), *count, "{version}");
            for flag in flags {
                let switch = SWITCHES.split(' ').any(|name| name == flag.name);
                assert_eq!(flag.value, !switch, "{version}: {}", flag.name);
            }
        }
    }

    #[test]
    fn a_value_that_only_an_equals_sign_gives() {
        let flags = listed("  -x, --one string[=\"a\"]   text\n      --two[=false]   text\n");
        assert_eq!(flags.len(), 2);
        assert!(flags.iter().all(|flag| !flag.value), "{flags:?}");
    }

    #[test]
    fn a_line_is_taken_apart_as_the_program_does() {
        let fake = Fake::new();
        let line =
            fake.line("-dq -c /conf exec -ceB /a:/b --env=X=1 --app y --nv=false a.sif ls -l --nv");
        assert_eq!(joined(&line.globals), "-dq -c /conf");
        assert_eq!(
            joined(&line.options),
            "-ceB /a:/b --env=X=1 --app y --nv=false"
        );
        assert_eq!(line.image, Path::new("a.sif"));
        assert_eq!(joined(&line.command), "ls -l --nv");
        let flags: Vec<&str> = line.flags.iter().map(String::as_str).collect();
        assert_eq!(flags, ["app", "bind", "cleanenv", "contain", "env"]);
    }

    #[test]
    fn words_of_every_shape() {
        let fake = Fake::new();
        for (words, options, image, command) in [
            ("exec a.sif ls", "", "a.sif", "ls"),
            ("exec -- -a.sif ls --", "", "-a.sif", "ls --"),
            (
                "exec -B/a -B=/b -e=false a.sif -",
                "-B/a -B=/b -e=false",
                "a.sif",
                "-",
            ),
            ("exec --bind -- a.sif ls", "--bind --", "a.sif", "ls"),
            ("exec --bind --nv a.sif ls", "--bind --nv", "a.sif", "ls"),
            (
                "exec --pwd /x --underlay a.sif ls",
                "--pwd /x --underlay",
                "a.sif",
                "ls",
            ),
            ("run a.sif", "", "a.sif", "/.singularity.d/runscript"),
            (
                "run a.sif -x --nv",
                "",
                "a.sif",
                "/.singularity.d/runscript -x --nv",
            ),
            (
                "run --app=y a.sif z",
                "--app=y",
                "a.sif",
                "/scif/apps/y/scif/runscript z",
            ),
        ] {
            let line = fake.line(words);
            assert_eq!(joined(&line.options), options, "{words}");
            assert_eq!(line.image, Path::new(image), "{words}");
            assert_eq!(joined(&line.command), command, "{words}");
        }
    }

    #[test]
    fn a_shell_is_asked_for() {
        let fake = Fake::new();
        for (words, options, wanted) in [
            ("shell a.sif", "", None),
            ("shell a.sif -c ls", "", None),
            ("shell --shell /bin/zsh a.sif", "", Some("/bin/zsh")),
            (
                "shell -cs/bin/zsh -B /a:/b --nv=false a.sif",
                "--contain --bind=/a:/b --nv=false",
                Some("/bin/zsh"),
            ),
            ("shell -s=x --shell= a.sif", "", None),
        ] {
            let line = fake.line(words);
            assert_eq!(joined(&line.options), options, "{words}");
            assert_eq!(line.image, Path::new("a.sif"), "{words}");
            assert!(line.command.is_empty(), "{words}");
            let wanted = wanted.map(OsString::from);
            assert_eq!(line.shell, Some(Shell { wanted }), "{words}");
        }
        assert_eq!(fake.line("exec a.sif ls").shell, None);
    }

    #[test]
    fn env_before_it_counts() {
        let fake = Fake::new();
        let program = fake.dir.path().join("apptainer");
        let mut argv: Vec<OsString> = ["env", "APPTAINER_NV=1", "APPTAINER_SHELL=/bin/x", "nice"]
            .map(OsString::from)
            .into();
        argv.push(program.into());
        argv.extend(["shell", "a.sif"].map(OsString::from));
        let line = understand(&argv, &fake.dir.path().join("memory")).unwrap();
        let Understood::Container(line) = line else {
            panic!("{line:?}");
        };
        assert_eq!(
            joined(&line.prefix),
            "env APPTAINER_NV=1 APPTAINER_SHELL=/bin/x nice"
        );
        assert!(line.flags.contains("nv"));
        let wanted = Some("/bin/x".into());
        assert_eq!(line.shell, Some(Shell { wanted }));
    }

    #[test]
    fn what_starts_no_application_passes() {
        let fake = Fake::new();
        for words in [
            "",
            "--version",
            "-h",
            "pull x docker://y",
            "-q build a.sif a.def",
            "instance start a.sif x",
            "exec --help",
            "exec -e -h a.sif ls",
            "help exec",
        ] {
            assert_eq!(
                fake.understand(words).unwrap(),
                Understood::Passthrough,
                "{words}"
            );
        }
        let other = ["python3".into(), "apptainer".into()];
        assert_eq!(
            understand(&other, Path::new("/none")).unwrap(),
            Understood::Foreign
        );
        assert_eq!(
            understand(&[], Path::new("/none")).unwrap(),
            Understood::Foreign
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let fake = Fake::new();
        for (words, said) in [
            (
                "exec --nope a.sif ls",
                "apptainer exec has no option --nope: Error for command: unknown flag: --nope",
            ),
            (
                "exec -eZ a.sif ls",
                "apptainer exec has no option -Z: its help does not list it",
            ),
            ("--nope exec a.sif ls", "apptainer has no option --nope"),
            (
                "exec --bind",
                "the option --bind of apptainer exec needs a value",
            ),
            ("exec -eB", "the option -B of apptainer exec needs a value"),
            (
                "run --runscript-timeout 1h a.sif",
                "the option --runscript-timeout of apptainer run cannot",
            ),
            ("exec", "apptainer exec needs a container image"),
            ("exec a.sif", "apptainer exec needs a command"),
            ("run", "apptainer run needs a container image"),
            ("shell", "apptainer shell needs a container image"),
            (
                "shell --syos a.sif",
                "the option --syos of apptainer shell cannot be combined with checkpoints: such a shell \
                 is in a virtual machine",
            ),
            (
                "exec --sharens a.sif ls",
                "the option --sharens of apptainer exec cannot be combined",
            ),
        ] {
            let text = fake.refused(words);
            assert!(text.starts_with(said), "{words}: {text}");
        }
        let none = understand(&["/nowhere/apptainer".into()], Path::new("/none"));
        assert!(none.unwrap_err().to_string().contains("/nowhere/apptainer"));
    }

    #[test]
    fn a_program_is_asked_once() {
        let fake = Fake::new();
        fake.line("-q exec --pwd / -e a.sif ls");
        assert_eq!(fake.asked(), 3);
        fake.line("-q exec --pwd / --nv a.sif ls");
        assert_eq!(fake.asked(), 3);
        // A memory that is damaged, and one of a program that was replaced, are not used.
        fs::write(fake.dir.path().join("memory"), "[{").unwrap();
        fake.line("-q exec -e a.sif ls");
        assert_eq!(fake.asked(), 5);
        let program = fake.dir.path().join("apptainer");
        let text = fs::read_to_string(&program).unwrap();
        fs::write(&program, text + "# newer\n").unwrap();
        fake.line("-q exec -e a.sif ls");
        assert_eq!(fake.asked(), 7);
    }

    #[test]
    fn a_program_without_a_help_is_an_error() {
        let fake = Fake::new();
        fs::write(
            fake.dir.path().join("apptainer"),
            "#!/bin/sh\necho no >&2; exit 3\n",
        )
        .unwrap();
        let text = fake.refused("exec a.sif ls");
        assert!(
            text.contains("lists no options") && text.ends_with(": no"),
            "{text}"
        );
    }
}
