//! What people write before `apptainer` in a step: `srun env X=1 apptainer exec …`,
//! `srun taskset -c 0-3 apptainer run …`; and images that are run as programs (`srun ./app.sif`).
//!
//! Contract: [`unwrapped`] finds the command line of Apptainer in such a line, with what goes before
//! it, and refuses by name what starts a container in a way that cannot be kept. It starts nothing. A
//! line in which Apptainer has no part is none of its business.
//!
//! No engine can hold a container from outside. A program that does something to itself and then
//! becomes the rest of its line (`nice`, `taskset`) may stay before Apptainer: it is run again at each
//! start, on whatever node. Anything else that starts containers has to be turned inside out, which
//! only its author can do.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::image;
use crate::shellscript::{self, Word};

/// Programs that become the rest of their command line, in the same process.
pub const BECOMING: [&str; 8] = [
    "env", "nice", "ionice", "chrt", "taskset", "numactl", "prlimit", "nohup",
];

/// Shells whose `-c` and scripts are looked through.
const SHELLS: [&str; 5] = ["sh", "bash", "dash", "ksh", "zsh"];

/// Commands of shells that tell or look for what they are given, and run nothing.
const TELLING: [&str; 5] = ["echo", "printf", "type", "which", "grep"];

/// Largest script that is looked through, in bytes.
const SCRIPT_MAX: u64 = 1 << 20;

/// The subcommands that run an application in the foreground.
pub const ACTIONS: [&str; 3] = ["exec", "run", "shell"];

/// How an image begins that the kernel can run as a program, and what that is: `run-singularity` becomes
/// `apptainer --quiet run IMAGE ARGUMENTS` (scripts/run-singularity of Apptainer 1.2 to 1.5; the
/// same with `singularity` of SingularityCE 4).
const LAUNCH: &[u8] = b"#!/usr/bin/env run-singularity";
const RUN: [&str; 2] = ["--quiet", "run"];

/// A command line of Apptainer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unwrapped {
    /// The words before it.
    pub prefix: Vec<OsString>,
    /// Not empty.
    pub argv: Vec<OsString>,
    pub environment: Environment,
}

/// This process's environment as `env` changes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(Vec<(OsString, Option<OsString>)>);

impl Environment {
    pub fn get(&self, name: &str) -> Option<OsString> {
        let changed = self.0.iter().rfind(|(key, _)| key == name);
        match changed {
            Some((_, value)) => value.clone(),
            None => std::env::var_os(name),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum WrapperError {
    #[error(
        "`{wrapper}` starts the container itself, and no engine can hold one from outside; let \
         {program} start it inside: `{program} exec IMAGE {wrapper} … COMMAND`"
    )]
    Outside { wrapper: String, program: String },
    #[error(
        "{script} starts containers itself, and no engine can hold them from outside; write each \
         `{program}` line as a step of its own (`srun {program} …`), or into the batch script \
         without srun"
    )]
    Script { script: String, program: String },
    #[error(
        "`env {option}` before {program} cannot be combined with checkpoints: {why}; for the \
         application, use {program}'s own options (--cleanenv, --env, --pwd)"
    )]
    Env {
        option: String,
        program: String,
        why: &'static str,
    },
}

/// The command line of Apptainer in `argv`, if there is one.
pub fn unwrapped(argv: &[OsString]) -> Result<Option<Unwrapped>, WrapperError> {
    let Some((first, words)) = argv.split_first() else {
        return Ok(None);
    };
    if is_apptainer(first) {
        return Ok(Some(Unwrapped {
            argv: argv.to_vec(),
            ..Unwrapped::default()
        }));
    }
    if let Some(image) = image_as_program(first) {
        return Ok(Some(Unwrapped {
            argv: run(&image, words),
            ..Unwrapped::default()
        }));
    }
    if is_becoming(first) {
        return behind(argv);
    }
    let name = file_name(first);
    if SHELLS.iter().any(|shell| name == *shell) {
        return of_shell(&name, words);
    }
    if let Some(at) = starts_apptainer(argv) {
        return Err(WrapperError::Outside {
            wrapper: file_name(first),
            program: file_name(&argv[at]),
        });
    }
    match script(first).and_then(|text| names_apptainer(&text)) {
        Some(program) => Err(WrapperError::Script {
            script: first.to_string_lossy().into_owned(),
            program,
        }),
        None => Ok(None),
    }
}

/// Whether `word`, the first of a command, names Apptainer or Singularity.
pub fn is_apptainer(word: &OsStr) -> bool {
    let name = file_name(word);
    name == "apptainer" || name == "singularity"
}

/// Of a line that begins with a program which becomes the rest of it.
fn behind(argv: &[OsString]) -> Result<Option<Unwrapped>, WrapperError> {
    let mut environment = Environment::default();
    let mut refused = None;
    let mut at = 0;
    while let Some(name) = argv.get(at).filter(|word| is_becoming(word)) {
        let words = &argv[at + 1..];
        at += 1 + match file_name(name) == "env" {
            true => of_env(words, &mut environment, &mut refused),
            false => words.iter().take_while(|word| is_own(word)).count(),
        };
    }
    let (prefix, rest) = argv.split_at(at);
    let Some(found) = unwrapped(rest)? else {
        return Ok(None);
    };
    match refused {
        Some((option, why)) => Err(WrapperError::Env {
            option,
            program: file_name(&found.argv[0]),
            why,
        }),
        None => Ok(Some(Unwrapped {
            prefix: prefix.to_vec(),
            environment,
            ..found
        })),
    }
}

fn is_becoming(word: &OsStr) -> bool {
    BECOMING.iter().any(|known| file_name(word) == *known)
}

/// Whether a word behind such a program is an option or the value of one, as far as that can be told
/// without knowing its options: their values are numbers, lists and words such as `idle`.
fn is_own(word: &OsStr) -> bool {
    let program = || {
        let path = word.as_bytes().contains(&b'/');
        path || is_apptainer(word) || super::command_line::find(word).is_some()
    };
    word.as_bytes().starts_with(b"-") || !program()
}

/// How many of the words behind `env` are its own, and what they change; an option that cannot be
/// kept, and why.
fn of_env(
    words: &[OsString],
    environment: &mut Environment,
    refused: &mut Option<(String, &'static str)>,
) -> usize {
    let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    let (mut at, mut options) = (0, true);
    while let Some(word) = words.get(at) {
        let bytes = word.as_bytes();
        let mut refuse = |why| {
            refused.get_or_insert((word.to_string_lossy().into_owned(), why));
        };
        match bytes {
            b"--" if options => options = false,
            b"-" | b"-i" | b"--ignore-environment" if options => {
                refuse("it takes away what engine and Slurm need as well");
            }
            b"-u" | b"--unset" if options => {
                at += 1;
                let name = words.get(at).cloned();
                environment.0.extend(name.map(|name| (name, None)));
            }
            _ if options && bytes.starts_with(b"--unset=") => {
                environment.0.push((text(&bytes[8..]), None));
            }
            _ if options && bytes.starts_with(b"-u") => {
                environment.0.push((text(&bytes[2..]), None));
            }
            _ if options && bytes.starts_with(b"-") => refuse("what it does is not known here"),
            _ => match bytes.iter().position(|byte| *byte == b'=') {
                Some(end) => {
                    options = false;
                    let value = Some(text(&bytes[end + 1..]));
                    environment.0.push((text(&bytes[..end]), value));
                }
                None => break,
            },
        }
        at += 1;
    }
    at.min(words.len())
}

/// Of a line that begins with a shell.
fn of_shell(shell: &str, words: &[OsString]) -> Result<Option<Unwrapped>, WrapperError> {
    let mut operands = words.iter().skip_while(|word| {
        word.as_bytes().starts_with(b"-") && !is_command_option(word.as_bytes())
    });
    let Some(word) = operands.next() else {
        return Ok(None);
    };
    let inline = is_command_option(word.as_bytes());
    let text = match inline {
        true => operands.next().map(|text| text.as_bytes().to_vec()),
        false => text_of(Path::new(word)),
    };
    let Some(program) = text.and_then(|text| names_apptainer(&text)) else {
        return Ok(None);
    };
    let written = match inline {
        true => format!("{shell} {} '…'", word.to_string_lossy()),
        false => format!("{shell} {}", word.to_string_lossy()),
    };
    Err(WrapperError::Script {
        script: format!("`{written}`"),
        program,
    })
}

/// Whether a word of a shell's is `-c`, alone or among other letters.
fn is_command_option(word: &[u8]) -> bool {
    word.starts_with(b"-") && !word.starts_with(b"--") && word.contains(&b'c')
}

/// Where in a line a command of Apptainer begins that runs an application.
fn starts_apptainer(argv: &[OsString]) -> Option<usize> {
    let starts = |at: &usize| is_apptainer(&argv[*at]) && action(&argv[at + 1..]).is_some();
    (0..argv.len()).find(starts)
}

/// The subcommand that `words`, behind the program, name.
fn action(words: &[OsString]) -> Option<&'static str> {
    let word = words
        .iter()
        .find(|word| !word.as_bytes().starts_with(b"-"))?;
    ACTIONS.into_iter().find(|action| word == action)
}

/// What `text`, a script of a shell, calls Apptainer by, if it certainly has it run an application.
fn names_apptainer(text: &[u8]) -> Option<String> {
    let (commands, _) = shellscript::commands(text);
    commands.into_iter().find_map(|command| {
        let words = command.words.iter();
        let words = words.skip_while(|word| word.assigned().is_some());
        let words: Vec<OsString> = words.map_while(Word::text).collect();
        // `exec`, `time` and programs may be before it; but not what only tells of it.
        let begins = words
            .first()
            .is_some_and(|word| !TELLING.iter().any(|known| word == known));
        let at = starts_apptainer(&words).filter(|_| begins);
        let own = at.map(|at| file_name(&words[at]));
        // Those are shorter than it.
        own.or_else(|| command.inside.iter().find_map(|text| names_apptainer(text)))
    })
}

/// The text of the program that `word` names, if that is a script of a shell.
fn script(word: &OsStr) -> Option<Vec<u8>> {
    let text = text_of(&super::command_line::find(word)?)?;
    let line = text
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let line = String::from_utf8_lossy(line);
    let is_shell = |word: &str| SHELLS.contains(&file_name(word.as_ref()).as_str());
    line.split_whitespace().any(is_shell).then_some(text)
}

/// What is in a file that may be a script.
fn text_of(path: &Path) -> Option<Vec<u8>> {
    let about = fs::metadata(path).ok()?;
    let may_be = about.is_file() && about.len() <= SCRIPT_MAX;
    let text = may_be.then(|| fs::read(path).ok())??;
    (!text.starts_with(b"\x7fELF")).then_some(text)
}

/// The file, if `word` names an image that the kernel runs as a program.
fn image_as_program(word: &OsStr) -> Option<PathBuf> {
    let path = super::command_line::find(word)?;
    let is_sif = image::sif_id(&path).is_ok_and(|id| id.is_some());
    let launches = |path: &Path| {
        use std::io::Read;
        let mut start = Vec::new();
        let file = fs::File::open(path).ok()?;
        file.take(LAUNCH.len() as u64)
            .read_to_end(&mut start)
            .ok()?;
        Some(start == LAUNCH)
    };
    (is_sif && launches(&path) == Some(true)).then_some(path)
}

/// What running an image as a program is.
fn run(image: &Path, arguments: &[OsString]) -> Vec<OsString> {
    let there = |name: &&str| super::command_line::find(name.as_ref()).is_some();
    let program = ["apptainer", "singularity"].into_iter().find(there);
    let mut line: Vec<OsString> = vec![program.unwrap_or("apptainer").into()];
    line.extend(RUN.map(OsString::from));
    line.push(image.into());
    line.extend_from_slice(arguments);
    line
}

fn file_name(word: &OsStr) -> String {
    let name = Path::new(word).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn joined(words: &[OsString]) -> String {
        words.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }

    #[test]
    fn what_becomes_apptainer_stays_before_it() {
        for (line, prefix, rest) in [
            ("apptainer exec a.sif ls", "", "apptainer exec a.sif ls"),
            (
                "env X=1 /opt/bin/apptainer run a.sif",
                "env X=1",
                "/opt/bin/apptainer run a.sif",
            ),
            (
                "/usr/bin/env -u A --unset=B -- X=/x/apptainer singularity exec a.sif ls",
                "/usr/bin/env -u A --unset=B -- X=/x/apptainer",
                "singularity exec a.sif ls",
            ),
            (
                "nice -n 5 env X=1 taskset -c 0-3 apptainer exec a.sif env ls",
                "nice -n 5 env X=1 taskset -c 0-3",
                "apptainer exec a.sif env ls",
            ),
            (
                "numactl --membind 0 apptainer --version",
                "numactl --membind 0",
                "apptainer --version",
            ),
        ] {
            let found = unwrapped(&words(line)).unwrap().unwrap();
            assert_eq!(joined(&found.prefix), prefix, "{line}");
            assert_eq!(joined(&found.argv), rest, "{line}");
        }
    }

    #[test]
    fn the_environment_is_as_env_makes_it() {
        let line = "env -u PATH -uHOME A=1 A=b=c apptainer exec a.sif ls";
        let found = unwrapped(&words(line)).unwrap().unwrap().environment;
        assert_eq!(found.get("PATH"), None);
        assert_eq!(found.get("HOME"), None);
        assert_eq!(found.get("A"), Some("b=c".into()));
        assert_eq!(
            found.get("CARGO_MANIFEST_DIR"),
            std::env::var_os("CARGO_MANIFEST_DIR")
        );
    }

    #[test]
    fn what_has_nothing_to_do_with_it() {
        for line in [
            "",
            "python3 app.py",
            "nice -n 5 python3 app.py",
            "env X=apptainer python3 exec",
            "nice python3 app.py a.sif",
            "env -i python3 app.py",
            "ls -l /usr/bin/apptainer",
            "grep apptainer script.sh",
            "bash -l",
            "bash script-that-is-not-there.sh",
            "env",
        ] {
            assert_eq!(unwrapped(&words(line)).unwrap(), None, "{line}");
        }
        for text in [
            "python3 app.py # apptainer exec",
            "echo apptainer exec app.sif",
            "echo 'x; apptainer exec app.sif ls'",
            "apptainer pull docker://debian",
        ] {
            let line = ["bash", "-c", text].map(OsString::from);
            assert_eq!(unwrapped(&line).unwrap(), None, "{text}");
        }
    }

    #[test]
    fn what_starts_containers_itself_is_refused_with_the_way_out() {
        for (line, said) in [
            (
                "timeout 60 apptainer exec a.sif ls",
                "let apptainer start it inside: `apptainer exec IMAGE timeout … COMMAND`",
            ),
            (
                "nice -n 5 python3 app.py apptainer exec a.sif ls",
                "`python3` starts the container itself",
            ),
            (
                "mpirun -n 2 singularity -q run a.sif",
                "let singularity start it inside: `singularity exec IMAGE mpirun … COMMAND`",
            ),
            (
                "env X=1 timeout 60 apptainer exec a.sif ls",
                "`timeout` starts the container itself",
            ),
            (
                "env -i apptainer exec a.sif ls",
                "`env -i` before apptainer",
            ),
            (
                "env -S apptainer exec a.sif ls",
                "`env -S` before apptainer",
            ),
        ] {
            let text = unwrapped(&words(line)).unwrap_err().to_string();
            assert!(text.contains(said), "{line}: {text}");
        }
        for (shell, text) in [
            ("-c", "cd x && apptainer exec a.sif ls"),
            ("-lc", "X=1 /usr/bin/singularity \\\n --quiet run a.sif"),
            ("-xc", "true; (\"apptainer\" shell a.sif)"),
            ("-c", "X=$Y Z=1 time apptainer exec $SIF ls"),
            (
                "-c",
                "for n in 1 2; do x=$(apptainer exec $SIF ls $n); done",
            ),
        ] {
            let line = ["/bin/bash", shell, text].map(OsString::from);
            let text = unwrapped(&line).unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("`bash {shell} '…'` starts containers")),
                "{text}"
            );
        }
        let text = "apptainer exec a.sif ls";
        let line = ["env", "X=1", "nice", "bash", "-c", text].map(OsString::from);
        assert!(unwrapped(&line).is_err());
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("step.sh");
        let path = script.to_str().unwrap();
        for (text, refused) in [
            ("#!/bin/bash\n# apptainer exec\ntrue\n", false),
            ("#!/bin/bash\ntrue\nexec apptainer exec a.sif ls\n", true),
            ("#!/usr/bin/env python3\napptainer exec a.sif ls\n", false),
        ] {
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
            assert_eq!(unwrapped(&words(path)).is_err(), refused, "{text}");
            let by_shell = refused || text.contains("python3");
            let line = words(&format!("bash -x {path} 1"));
            assert_eq!(unwrapped(&line).is_err(), by_shell, "{text}");
        }
    }

    #[test]
    fn an_image_is_run_as_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("app.sif");
        let path = image.to_str().unwrap();
        let mut bytes = LAUNCH.to_vec();
        bytes.resize(32, b'\n');
        bytes.extend_from_slice(b"SIF_MAGIC\0");
        bytes.resize(128, 0);
        fs::write(&image, &bytes).unwrap();
        assert_eq!(unwrapped(&words(path)).unwrap(), None, "cannot be run");
        fs::set_permissions(&image, fs::Permissions::from_mode(0o755)).unwrap();
        for (line, prefix) in [
            (format!("{path} a -b"), ""),
            (format!("env X=1 {path} a -b"), "env X=1"),
        ] {
            let found = unwrapped(&words(&line)).unwrap().unwrap();
            let expected = format!("--quiet run {path} a -b");
            assert!(joined(&found.argv).ends_with(&expected), "{found:?}");
            assert_eq!(joined(&found.prefix), prefix);
        }
        bytes[0] = b'x';
        fs::write(&image, &bytes).unwrap();
        assert_eq!(unwrapped(&words(path)).unwrap(), None, "no program");
    }
}
