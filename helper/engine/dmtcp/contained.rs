//! DMTCP that a container image brings itself (`placement: contained`), and programs that start DMTCP
//! themselves.
//!
//! ```text
//! helper ─ relay ─ a container of the image: dmtcp_coordinator     the same version as what follows
//!    └── the application's container: dmtcp_launch COMMAND         held as a whole, or
//!                                     COMMAND ─ dmtcp_launch …     started by itself
//! ```
//!
//! The coordinator comes from the image, whose DMTCP it has to understand, and the host need not have
//! any. It does not run in the application's container: there it would be a child or a fellow that
//! the application sees. It gets a container of its own with nothing of the host in it but its
//! directory.
//!
//! Images made for this start DMTCP themselves: their %runscript calls `dmtcp_launch`, or DMTCP's
//! restart script if it finds one, or users write `dmtcp_launch` before their command. DMTCP cannot be
//! started under DMTCP (it ends what tries with code 99, `dmtcp_execvpe()` in execwrappers.cpp). So such
//! a command is not held as a whole: it runs as it would without us, finds programs of ours before
//! DMTCP's own in its PATH ([`NAMES`]), and these start the real ones in a way that we can save what
//! they hold. At a restart the command runs again, as its author meant it to, and comes to the point
//! where `dmtcp_launch` is called once more; there the saved state goes on. Commands that were
//! finished before that are not run again.
//!
//! A shell that reads its commands from a file or pipe may come to a `dmtcp_launch` as well, which nobody
//! knows beforehand. It is held as a whole, and `dmtcp_launch` then becomes its command: by a function,
//! since DMTCP lets nothing of that name be started ([`functions`]; bash has them from the environment,
//! other shells do not). One into which somebody types cannot go on itself, so that runs as a command
//! that starts DMTCP itself does.
//!
//! Ours and the helper meet in the application's working directory:
//!
//! ```text
//! launch        the real dmtcp_launch, as a script that is read with its command as "$@"
//! restart       the real dmtcp_restart with all it needs; only if there is something to restart
//! port          the coordinator's
//! launches/N    a directory for every call of dmtcp_launch in this run
//! saved         how many there were when the generation was saved that is restarted
//! interval      how often it wishes to be saved, in seconds
//! images/       DMTCP_CHECKPOINT_DIR; at a restart there is a dmtcp_restart_script.sh, for scripts that
//!               look whether there is one
//! ```
//!
//! A generation keeps `interval` and, as `launches`, their number.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::container::{Apptainer, Bind, INSIDE, INSIDE_WORK, Inside, Place};
use crate::shell;

/// Our programs in place of DMTCP's own.
const PROGRAMS: &[(&str, &str)] = &[
    ("dmtcp_launch", include_str!("contained/dmtcp_launch.sh")),
    ("dmtcp_restart", include_str!("contained/dmtcp_restart.sh")),
    (RESTART_SCRIPT, include_str!("contained/dmtcp_restart.sh")),
    (
        "dmtcp_coordinator",
        include_str!("contained/dmtcp_coordinator.sh"),
    ),
    ("dmtcp_command", include_str!("contained/dmtcp_command.sh")),
];

/// What DMTCP leaves beside process images to restart them.
const RESTART_SCRIPT: &str = "dmtcp_restart_script.sh";

/// Their directory below that of our programs.
pub const NAMES: &str = "instead-of-dmtcp";

/// The name of the file in which the application leaves the interval that it wishes, in seconds: in
/// its working directory, and in a generation.
pub const INTERVAL: &str = "interval";

/// The name of the file in a generation that tells how often `dmtcp_launch` had been called.
pub const LAUNCHES: &str = "launches";

/// What ours find set in a shell that is held as a whole.
const HELD: &str = "CONTAINER_CHECKPOINT_HELD";

/// The prefix that ours have under names that DMTCP lets be started.
const UNDER: &str = "under-";

/// By which a user tells DMTCP an interval.
pub const INTERVAL_VARIABLE: &str = "DMTCP_CHECKPOINT_INTERVAL";

/// Longest interval, in seconds: 30 days, as for the option.
const INTERVAL_MAX: u64 = 30 * 86_400;

/// Puts our programs below `runtime`, each whole, unless they are there. May be done by several
/// helpers at once.
pub fn stage(runtime: &Path) -> io::Result<()> {
    let dir = runtime.join(NAMES);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)?;
    let named = |(name, text): &(&str, &'static str)| {
        [
            ((*name).to_owned(), *text),
            (format!("{UNDER}{name}"), *text),
        ]
    };
    for (name, text) in PROGRAMS.iter().flat_map(named) {
        let path = dir.join(name);
        if fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
            continue;
        }
        let mut file = tempfile::NamedTempFile::new_in(&dir)?;
        file.write_all(text.as_bytes())?;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(0o500))?;
        // Closed before it has its name: a program that is open for writing cannot be run.
        file.into_temp_path().persist(&path)?;
    }
    Ok(())
}

/// Ours for `program`, where that is one of DMTCP's by name or path, as seen in a container.
pub fn instead_of(program: &Path) -> Option<PathBuf> {
    let name = program.file_name()?;
    let (name, _) = PROGRAMS.iter().find(|(ours, _)| name == *ours)?;
    Some(Path::new(INSIDE).join(NAMES).join(name))
}

/// Variables by which bash has functions that start ours, in a shell that is held as a whole.
pub fn functions() -> impl Iterator<Item = (String, String)> {
    let dir = Path::new(INSIDE).join(NAMES);
    // The name of a function has no dot, in POSIX mode.
    let names = PROGRAMS.iter().filter(|(name, _)| !name.contains('.'));
    names.map(move |(name, _)| {
        let ours = dir.join(format!("{UNDER}{name}"));
        let text = format!("() {{ {HELD}=1 {} \"$@\"; }}", ours.display());
        (format!("BASH_FUNC_{name}%%"), text)
    })
}

/// Leaves in `work` what our programs need to start and, from the generation's directory `from` with
/// such a command, to restart: the real programs' command lines up to the command.
pub fn leave_word(
    work: &Path,
    port: u16,
    launch: &[OsString],
    restart: Option<(&Path, &[OsString])>,
) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(work.join("launches"))?;
    fs::write(work.join("port"), port.to_string())?;
    let mut line = script(launch);
    line.extend_from_slice(b" \"$@\"\n");
    fs::write(work.join("launch"), line)?;
    if let Some((from, restart)) = restart {
        let mut line = script(restart);
        line.push(b'\n');
        fs::write(work.join("restart"), line)?;
        fs::write(work.join("saved"), fs::read(from.join(LAUNCHES))?)?;
        std::os::unix::fs::symlink(
            Path::new(INSIDE).join(NAMES).join(RESTART_SCRIPT),
            work.join("images").join(RESTART_SCRIPT),
        )?;
    }
    Ok(())
}

/// A line of shell that becomes the command `words`.
fn script(words: &[OsString]) -> Vec<u8> {
    let mut line = b"exec".to_vec();
    for word in words {
        line.push(b' ');
        line.extend(shell::quoted(word.as_encoded_bytes()));
    }
    line
}

/// Whether a generation's directory is of a command that starts DMTCP by itself.
pub fn by_itself(from: &Path) -> bool {
    from.join(LAUNCHES).is_file()
}

/// Keeps what a generation in `into` needs of the working directory `work`, besides process images.
pub fn keep(work: &Path, into: &Path) -> io::Result<()> {
    copy(work, into)?;
    match fs::read_dir(work.join("launches")) {
        Ok(calls) => fs::write(into.join(LAUNCHES), format!("{}\n", calls.count())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Copies the interval that an application wished, if it did.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::read(from.join(INTERVAL)) {
        Ok(wish) => fs::write(to.join(INTERVAL), wish),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// The coordinator in the directory `bin` of an image, with `dir` of the host as its directory.
/// `runtime` is the host directory of our programs.
///
/// None of the user's options are taken over: an overlay, for one, cannot be used by two containers.
pub fn coordinator(apptainer: &Apptainer, runtime: &Path, bin: &Path, dir: &Path) -> Command {
    let place = Place::Apptainer(Apptainer {
        prefix: Vec::new(),
        options: Vec::new(),
        flags: Default::default(),
        binds: Vec::new(),
        variables: Vec::new(),
        ..apptainer.clone()
    });
    let mut inside = Inside {
        binds: vec![
            Bind {
                host: runtime.into(),
                inside: INSIDE.into(),
                writable: false,
            },
            Bind {
                host: dir.into(),
                inside: INSIDE_WORK.into(),
                writable: true,
            },
        ],
        flags: ["--containall", "--no-home", "--pwd", INSIDE_WORK]
            .map(Into::into)
            .into(),
        env: vec![("DMTCP_TMPDIR".into(), INSIDE_WORK.into())],
        argv: vec![bin.join("dmtcp_coordinator").into()],
    };
    inside
        .argv
        .extend(super::relay::coordinator_options(Path::new(INSIDE_WORK)));
    let mut command = place.command_in_our_group(&inside);
    for name in [
        "OVERLAY", "BIND", "BINDPATH", "MOUNT", "NV", "ROCM", "WRITABLE",
    ] {
        for program in ["APPTAINER", "SINGULARITY"] {
            command.env_remove(format!("{program}_{name}"));
        }
    }
    command
}

/// How often the application wishes to be saved, by DMTCP's own option or variable.
#[derive(Debug)]
pub struct Wish {
    file: PathBuf,
    changes: Inotify,
}

impl Wish {
    /// The wish of the application whose working directory is `work`.
    pub fn of(work: &Path) -> io::Result<Wish> {
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        changes.add_watch(
            work,
            AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO,
        )?;
        Ok(Wish {
            file: work.join(INTERVAL),
            changes,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// The interval. `None` for none, for 0, which is DMTCP's for none, and for nonsense.
    pub fn interval(&self) -> Option<Duration> {
        // What has happened does not matter: the file tells.
        while self.changes.read_events().is_ok() {}
        let text = fs::read_to_string(&self.file).ok()?;
        let seconds: u64 = text.trim().parse().ok()?;
        (1..=INTERVAL_MAX)
            .contains(&seconds)
            .then(|| Duration::from_secs(seconds))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        let dir = tempfile::tempdir().unwrap();
        let words = ["printf", "%s|", "a b", "it's", "$HOME", "\\"].map(OsString::from);
        leave_word(dir.path(), 4711, &words, None).unwrap();
        let out = Command::new("sh")
            .arg("-c")
            .arg("set -- 'x y' z; . ./launch")
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "a b|it's|$HOME|\\|x y|z|"
        );
    }

    #[test]
    fn ours_stand_for_dmtcps_own() {
        let ours = instead_of(Path::new("/usr/local/bin/dmtcp_launch")).unwrap();
        assert_eq!(
            ours,
            Path::new("/.container-checkpoint/instead-of-dmtcp/dmtcp_launch")
        );
        assert_eq!(instead_of(Path::new("dmtcp_nocheckpoint")), None);
        assert_eq!(instead_of(Path::new("python3")), None);
    }

    #[test]
    fn functions_of_a_shell_start_ours() {
        let said = Command::new("bash")
            .args(["-c", "declare -f dmtcp_launch"])
            .envs(functions())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let line = "CONTAINER_CHECKPOINT_HELD=1 \
                    /.container-checkpoint/instead-of-dmtcp/under-dmtcp_launch \"$@\"";
        assert!(said.contains(line), "{said}");
    }

    #[test]
    fn a_wish_is_read_once_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let wish = Wish::of(dir.path()).unwrap();
        let changed = || crate::sys::readable(&wish.fd(), Some(Instant::now())).unwrap();
        assert_eq!(wish.interval(), None);
        for (text, expected) in [
            ("10\n", Some(10)),
            ("0", None),
            ("x", None),
            ("2592001", None),
        ] {
            fs::write(dir.path().join(INTERVAL), text).unwrap();
            assert!(changed(), "{text:?}");
            assert_eq!(wish.interval(), expected.map(Duration::from_secs));
            assert!(!changed(), "{text:?}");
        }
    }
}
