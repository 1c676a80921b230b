//! What a program in a place is: how it is linked, against which glibc, and which of our own objects
//! lack a library there.
//!
//! Contract: [`inspect`] tells the facts and judges nothing. On the bare host it looks for itself;
//! in a container it runs this helper inside (hidden command [`INSPECT`]), so that every kind of
//! image, bind and variable counts as it will for the application. The place's own dynamic loader is
//! asked which libraries it finds, because only it knows.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use object::{Object, ObjectSection};
use serde::{Deserialize, Serialize};

use super::{Apptainer, Bind, INSIDE, Inside, Place};
use crate::runtime;

/// The helper's hidden command: `container-checkpoint inspect [--object FILE]… -- COMMAND…`, or
/// `inspect --first FILE…`.
pub const INSPECT: &str = "inspect";
const FIRST: &str = "--first";

/// How many interpreters of interpreters are followed; the kernel allows five.
const CHAIN_MAX: usize = 5;

/// Largest ELF file that is looked into, in bytes. It is mapped in parts, so this is generous.
const ELF_MAX: u64 = 8 << 30;

/// Largest script that is looked through, in bytes.
const SCRIPT_MAX: u64 = 1 << 20;

/// Programs that read commands where they are given none.
const SHELLS: [&str; 8] = ["sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh"];

/// A glibc version such as 2.36.
pub type Glibc = (u32, u32);

/// What is known of a command's program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The file that the command's first word stands for, if found.
    pub program: Option<PathBuf>,
    /// Scripts only: the programs that interpret it, outermost last.
    pub interpreters: Vec<PathBuf>,
    /// The program itself, or a script's last interpreter.
    pub kind: Kind,
    /// Whether it runs with another user's or group's rights.
    pub setuid: bool,
    /// Whether it was made by Go.
    pub go: bool,
    /// Libraries that the place's loader does not find for the objects asked for.
    pub missing: Vec<String>,
    /// File names of the libraries that the loader finds for a dynamic program, sorted.
    pub libraries: Vec<String>,
    /// What the loader said of them that is not about a missing library, such as a glibc too old.
    pub refused: Option<String>,
    /// The DMTCP of the container image. Looked for in containers only.
    #[serde(default)]
    pub dmtcp: Option<OwnDmtcp>,
    /// Whether the command starts DMTCP itself, as far as its words and the scripts they name tell, or
    /// is a shell for somebody who types and may. Looked for in containers only.
    #[serde(default)]
    pub starts_dmtcp: bool,
}

/// A DMTCP that a container image brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDmtcp {
    /// The directory of its programs.
    pub bin: PathBuf,
    /// What `dmtcp_launch --version` says, e.g. `4.1.1`, or why it does not.
    pub version: Result<String, String>,
}

/// How a program is linked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Dynamic {
        /// The dynamic loader.
        interpreter: PathBuf,
        /// The newest version that its libc has, if that is a glibc.
        glibc: Option<Glibc>,
    },
    Musl,
    Static,
    /// An ELF program of another machine.
    Foreign,
    NotFound,
    /// The reason.
    NotExecutable(String),
}

#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error("cannot look at the program in the container: {0}")]
    Run(std::io::Error),
    #[error("cannot look at the program in {image}: {said}")]
    Failed { image: PathBuf, said: String },
    #[error("cannot understand what was found in {image}: {source}")]
    Answer {
        image: PathBuf,
        source: serde_json::Error,
    },
}

/// Looks at `command` in `place`. `objects` are programs or libraries of ours, as seen in the place;
/// `runtime` is the host directory of our programs, not used on the bare host.
pub fn inspect(
    place: &Place,
    command: &[OsString],
    runtime: &Path,
    objects: &[PathBuf],
) -> Result<Facts, InspectError> {
    let Place::Apptainer(apptainer) = place else {
        return Ok(look(command, objects));
    };
    let mut words = Vec::new();
    for object in objects {
        words.push("--object".into());
        words.push(object.into());
    }
    words.push("--".into());
    words.extend_from_slice(command);
    let mut facts: Facts = ask(place, apptainer, runtime, words)?;
    // Here and not inside, where there is no input.
    facts.starts_dmtcp |=
        facts.dmtcp.is_some() && reads_commands(command) && std::io::stdin().is_terminal();
    Ok(facts)
}

/// The number of the first of `files` that can be run in `place`, if there is one. `runtime` is as for
/// [`inspect`].
pub fn first_executable(
    place: &Place,
    runtime: &Path,
    files: &[OsString],
) -> Result<Option<usize>, InspectError> {
    let Place::Apptainer(apptainer) = place else {
        return Ok(first_of(files));
    };
    let words = [&[FIRST.into()], files].concat();
    ask(place, apptainer, runtime, words)
}

fn first_of(files: &[OsString]) -> Option<usize> {
    let runs = |file: &OsString| {
        nix::unistd::access(Path::new(file), nix::unistd::AccessFlags::X_OK).is_ok()
    };
    files.iter().position(runs)
}

/// What the hidden command with `words` says in a container.
fn ask<T: serde::de::DeserializeOwned>(
    place: &Place,
    apptainer: &Apptainer,
    runtime: &Path,
    words: Vec<OsString>,
) -> Result<T, InspectError> {
    let mut argv = runtime::Runtime::argv(place.programs(runtime), runtime::HELPER);
    argv.push(INSPECT.into());
    argv.extend(words);
    let inside = Inside {
        binds: vec![Bind {
            host: runtime.into(),
            inside: INSIDE.into(),
            writable: false,
        }],
        argv,
        ..Inside::default()
    };
    let out = place
        .command(&inside)
        .stdin(Stdio::null())
        .output()
        .map_err(InspectError::Run)?;
    let image = || apptainer.image.clone();
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(InspectError::Failed {
            image: image(),
            said: match said.trim() {
                "" => out.status.to_string(),
                said => said.to_owned(),
            },
        });
    }
    // A container's start scripts may print before us.
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().next_back().unwrap_or_default();
    serde_json::from_str(line).map_err(|source| InspectError::Answer {
        image: image(),
        source,
    })
}

/// The hidden command: `arguments` are those after [`INSPECT`]. Returns what to print.
pub fn inside(arguments: &[OsString]) -> Result<String, serde_json::Error> {
    if let Some((first, files)) = arguments.split_first()
        && first == FIRST
    {
        return serde_json::to_string(&first_of(files));
    }
    let mut objects = Vec::new();
    let mut rest = arguments.iter();
    let mut command = Vec::new();
    while let Some(word) = rest.next() {
        match word.as_bytes() {
            b"--object" => objects.extend(rest.next().map(PathBuf::from)),
            b"--" => command = rest.by_ref().cloned().collect(),
            _ => {}
        }
    }
    let mut facts = look(&command, &objects);
    facts.dmtcp = own_dmtcp();
    facts.starts_dmtcp = starts_dmtcp(&command, facts.program.as_deref());
    serde_json::to_string(&facts)
}

/// Whether a command is a shell that reads its commands from standard input.
pub fn reads_commands(command: &[OsString]) -> bool {
    let Some((shell, options)) = command.split_first() else {
        return false;
    };
    let name = Path::new(shell).file_name();
    // Letters may be together: `-lc`.
    let is_plain = |option: &OsString| {
        let bytes = option.as_bytes();
        bytes.starts_with(b"--") || (bytes.starts_with(b"-") && !bytes.contains(&b'c'))
    };
    name.is_some_and(|name| SHELLS.iter().any(|shell| name == *shell))
        && options.iter().all(is_plain)
}

/// Whether a command of which `program` is the file starts DMTCP itself: names it, or is a script
/// that does.
fn starts_dmtcp(command: &[OsString], program: Option<&Path>) -> bool {
    command.iter().any(|word| names_dmtcp(word.as_bytes()))
        || command
            .iter()
            .map(Path::new)
            .chain(program)
            .any(script_starts_dmtcp)
}

/// Whether the file is a script that starts DMTCP.
pub fn script_starts_dmtcp(file: &Path) -> bool {
    let readable = fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.len() <= SCRIPT_MAX);
    // Most words of a command name no file.
    readable && fs::read(file).is_ok_and(|text| !text.starts_with(b"\x7fELF") && names_dmtcp(&text))
}

fn names_dmtcp(text: &[u8]) -> bool {
    [&b"dmtcp_launch"[..], b"dmtcp_restart"]
        .iter()
        .any(|name| text.windows(name.len()).any(|window| window == *name))
}

/// The DMTCP whose `dmtcp_launch` is in PATH.
fn own_dmtcp() -> Option<OwnDmtcp> {
    let launch = find(OsStr::new("dmtcp_launch"))?;
    let launch = launch.canonicalize().unwrap_or(launch);
    Some(OwnDmtcp {
        bin: launch.parent()?.to_path_buf(),
        version: dmtcp_version(&launch),
    })
}

/// The version of the DMTCP to which `launch` belongs, as that says it.
pub fn dmtcp_version(launch: &Path) -> Result<String, String> {
    let out = Command::new(launch)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&out.stdout);
    // "dmtcp_launch (DMTCP) 4.1.1"
    text.lines()
        .next()
        .and_then(|line| line.split_once("(DMTCP) "))
        .map(|(_, version)| version.trim().to_owned())
        .filter(|version| version.starts_with(|first: char| first.is_ascii_digit()))
        .ok_or_else(|| String::from_utf8_lossy(&out.stderr).trim().to_owned())
}

/// Looks at `command` where this process runs.
fn look(command: &[OsString], objects: &[PathBuf]) -> Facts {
    let mut facts = Facts {
        program: None,
        interpreters: Vec::new(),
        kind: Kind::NotFound,
        setuid: false,
        go: false,
        missing: Vec::new(),
        libraries: Vec::new(),
        refused: None,
        dmtcp: None,
        starts_dmtcp: false,
    };
    let Some(mut file) = command.first().and_then(|word| find(word)) else {
        return facts;
    };
    facts.program = Some(file.clone());
    for _ in 0..CHAIN_MAX {
        facts.setuid |= is_setuid(&file);
        match script(&file) {
            Ok(Some(next)) => {
                facts.interpreters.push(next.clone());
                file = next;
            }
            Ok(None) => {
                facts.kind = linked(&file, &mut facts.go);
                break;
            }
            Err(why) => {
                facts.kind = Kind::NotExecutable(why);
                return facts;
            }
        }
    }
    if let Kind::Dynamic { interpreter, glibc } = &mut facts.kind {
        let found = listed(interpreter, &file).found;
        *glibc = found.get("libc.so.6").and_then(|libc| glibc_of(libc));
        facts.libraries = found.into_keys().collect();
        for object in objects {
            let mut listed = listed(interpreter, object);
            facts.missing.append(&mut listed.missing);
            facts.refused = facts.refused.or(listed.refused);
        }
        facts.missing.sort();
        facts.missing.dedup();
    }
    facts
}

/// The file that a shell would run for `word`.
fn find(word: &OsStr) -> Option<PathBuf> {
    if word.as_bytes().contains(&b'/') {
        return Path::new(word).is_file().then(|| PathBuf::from(word));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|dir| dir.join(word))
        .find(|file| file.is_file() && is_executable(file))
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).map_or(0, |meta| meta.permissions().mode())
}

fn is_executable(file: &Path) -> bool {
    mode(file) & 0o111 != 0
}

fn is_setuid(file: &Path) -> bool {
    mode(file) & 0o6000 != 0
}

/// The interpreter of a script, nothing for an ELF program. `env` is looked through.
fn script(file: &Path) -> Result<Option<PathBuf>, String> {
    let mut start = Vec::new();
    fs::File::open(file)
        .and_then(|open| open.take(256).read_to_end(&mut start))
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    if !is_executable(file) {
        return Err(format!("{} is not executable", file.display()));
    }
    if start.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    let Some(line) = start.strip_prefix(b"#!") else {
        return Err(format!(
            "{} is neither an ELF program nor a script that begins with #!",
            file.display()
        ));
    };
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let mut words = line
        .split(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
        .filter(|word| !word.is_empty());
    let Some(first) = words.next().map(OsStr::from_bytes) else {
        return Err(format!("{} begins with an empty #! line", file.display()));
    };
    let mut named = first;
    if Path::new(first).file_name() == Some(OsStr::new("env")) {
        // `env -S VAR=x python3`: options and variables do not name the program.
        if let Some(word) = words.find(|word| !word.starts_with(b"-") && !word.contains(&b'=')) {
            named = OsStr::from_bytes(word);
        }
    }
    match find(named) {
        Some(next) => Ok(Some(next)),
        None => Err(format!(
            "{} needs the interpreter {}, which is not there",
            file.display(),
            named.display()
        )),
    }
}

/// How an ELF program is linked; sets `go`.
fn linked(file: &Path, go: &mut bool) -> Kind {
    let broken = |why: String| Kind::NotExecutable(format!("{}: {why}", file.display()));
    let cache = match open_elf(file) {
        Ok(cache) => cache,
        Err(error) => return broken(error.to_string()),
    };
    let elf = match object::read::elf::ElfFile64::<object::Endianness, _>::parse(&cache) {
        Ok(elf) => elf,
        Err(_) => return Kind::Foreign,
    };
    if elf.architecture() != native() {
        return Kind::Foreign;
    }
    *go = elf.section_by_name(".go.buildinfo").is_some()
        || elf.section_by_name(".note.go.buildid").is_some();
    match interpreter(&elf) {
        None => Kind::Static,
        Some(path)
            if path
                .as_os_str()
                .as_bytes()
                .windows(7)
                .any(|w| w == b"ld-musl") =>
        {
            Kind::Musl
        }
        Some(path) if !path.exists() => broken(format!(
            "its dynamic loader {} is not there",
            path.display()
        )),
        Some(interpreter) => Kind::Dynamic {
            interpreter,
            glibc: None,
        },
    }
}

type Cache = object::read::ReadCache<fs::File>;

fn open_elf(file: &Path) -> std::io::Result<Cache> {
    let open = fs::File::open(file)?;
    if open.metadata()?.len() > ELF_MAX {
        return Err(std::io::Error::other("too large for a program"));
    }
    Ok(object::read::ReadCache::new(open))
}

fn native() -> object::Architecture {
    match cfg!(target_arch = "aarch64") {
        true => object::Architecture::Aarch64,
        false => object::Architecture::X86_64,
    }
}

fn interpreter<'a>(
    elf: &object::read::elf::ElfFile64<'a, object::Endianness, &'a Cache>,
) -> Option<PathBuf> {
    use object::read::elf::ProgramHeader;
    elf.elf_program_headers().iter().find_map(|segment| {
        let bytes = segment.interpreter(elf.endian(), elf.data()).ok()??;
        Some(PathBuf::from(OsStr::from_bytes(bytes)))
    })
}

/// The newest `GLIBC_x.y` that `file` names: for a libc the version it is of, for anything else the
/// version it needs. Nothing when it names none or is no ELF file.
pub fn glibc_of(file: &Path) -> Option<Glibc> {
    let cache = open_elf(file).ok()?;
    let elf = object::File::parse(&cache).ok()?;
    let strings = elf.section_by_name(".dynstr")?;
    let strings = strings.data().ok()?;
    strings
        .split(|byte| *byte == 0)
        .filter_map(|name| {
            let version = std::str::from_utf8(name.strip_prefix(b"GLIBC_")?).ok()?;
            let (major, minor) = version.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        })
        .max()
}

/// The libraries that this host's dynamic loader finds for `program`: names and files. Empty for
/// what is not a dynamic program.
pub fn libraries_of(program: &Path) -> BTreeMap<String, PathBuf> {
    let mut go = false;
    match linked(program, &mut go) {
        Kind::Dynamic { interpreter, .. } => listed(&interpreter, program).found,
        _ => BTreeMap::new(),
    }
}

/// What the dynamic loader finds for a file.
#[derive(Debug, Default)]
struct Listed {
    found: BTreeMap<String, PathBuf>,
    missing: Vec<String>,
    refused: Option<String>,
}

/// Asks the dynamic loader `loader` what it would load for `file`, as `ldd` does.
fn listed(loader: &Path, file: &Path) -> Listed {
    let mut listed = Listed::default();
    let out = match Command::new(loader)
        // Not `--list`, which gives up at the first library that is missing.
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .arg(file)
        .stdin(Stdio::null())
        .output()
    {
        Ok(out) => out,
        Err(error) => {
            listed.refused = Some(format!("cannot run {}: {error}", loader.display()));
            return listed;
        }
    };
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let Some((name, found)) = line.trim().split_once(" => ") else {
            continue;
        };
        if found == "not found" {
            listed.missing.push(name.to_owned());
        } else {
            let path = found.rsplit_once(" (").map_or(found, |(path, _)| path);
            listed.found.insert(name.to_owned(), path.into());
        }
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let said = said.trim();
    if !said.is_empty() {
        // "PROGRAM: /lib/libc.so.6: version `GLIBC_2.34' not found (required by …)"
        listed.refused = Some(said.to_owned());
    } else if !out.status.success() && listed.missing.is_empty() {
        listed.refused = Some(format!("the dynamic loader ended with {}", out.status));
    }
    listed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_dynamic_program_and_its_glibc() {
        let facts = look(&words(&["sh", "-c", "true"]), &[]);
        let Kind::Dynamic { glibc, .. } = facts.kind else {
            panic!("{facts:?}");
        };
        assert!(glibc.unwrap() >= (2, 17), "{glibc:?}");
        assert!(!facts.setuid && !facts.go && facts.missing.is_empty());
    }

    #[test]
    fn scripts_are_followed_through_env() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("script");
        fs::write(&file, "#!/usr/bin/env -S bash\ntrue\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let facts = look(&[file.clone().into()], &[]);
        assert!(matches!(facts.kind, Kind::Dynamic { .. }), "{facts:?}");
        assert!(facts.interpreters[0].ends_with("bash"));

        fs::write(&file, "#!/no/such/thing\n").unwrap();
        let facts = look(&[file.clone().into()], &[]);
        let Kind::NotExecutable(why) = facts.kind else {
            panic!("{facts:?}");
        };
        assert!(why.contains("/no/such/thing"), "{why}");
    }

    #[test]
    fn what_starts_dmtcp_itself() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.sh");
        let path = file.to_str().unwrap();
        fs::write(&file, "#!/bin/sh\nexec dmtcp_launch --coord-port 0 app\n").unwrap();
        for command in [
            &["dmtcp_launch", "app"][..],
            &["/opt/bin/dmtcp_launch", "app"],
            &["sh", "-c", "cd x && dmtcp_launch app"],
            &["./dmtcp_restart_script.sh"],
            &["sh", path],
        ] {
            assert!(starts_dmtcp(&words(command), None), "{command:?}");
        }
        assert!(starts_dmtcp(&words(&["run.sh"]), Some(&file)));
        fs::write(&file, "#!/bin/sh\nexec app\n").unwrap();
        for command in [&["python3", "app.py"][..], &["sh", path], &[]] {
            assert!(!starts_dmtcp(&words(command), None), "{command:?}");
        }
    }

    #[test]
    fn which_shells_read_their_commands() {
        for (command, reads) in [
            (&["/bin/bash"][..], true),
            (&["/bin/bash", "--norc"], true),
            (&["sh", "-l"], true),
            (&["sh", "script"], false),
            (&["bash", "-lc", "ls"], false),
            (&["python3"], false),
            (&[], false),
        ] {
            assert_eq!(reads_commands(&words(command)), reads, "{command:?}");
        }
    }

    #[test]
    fn the_first_that_can_be_run() {
        let files = words(&["/no/such/shell", "/etc/passwd", "/bin/sh", "/bin/bash"]);
        let line = inside(&[words(&[FIRST]), files].concat()).unwrap();
        assert_eq!(
            serde_json::from_str::<Option<usize>>(&line).unwrap(),
            Some(2)
        );
        let none = inside(&words(&[FIRST, "/no/such/shell"])).unwrap();
        assert_eq!(serde_json::from_str::<Option<usize>>(&none).unwrap(), None);
    }

    #[test]
    fn what_is_no_program() {
        assert_eq!(Kind::NotFound, look(&words(&["no-such-program"]), &[]).kind);
        assert_eq!(Kind::NotFound, look(&[], &[]).kind);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        for content in ["", "\x7fELF", "text"] {
            fs::write(&file, content).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            let kind = look(&[file.clone().into()], &[]).kind;
            assert!(
                matches!(kind, Kind::NotExecutable(_) | Kind::Foreign),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn the_answer_is_read_back() {
        let line = inside(&words(&["--object", "/bin/sh", "--", "sh"])).unwrap();
        let mut facts: Facts = serde_json::from_str(&line).unwrap();
        // Looked for in containers only.
        facts.dmtcp = None;
        assert_eq!(facts, look(&words(&["sh"]), &["/bin/sh".into()]));
    }
}
