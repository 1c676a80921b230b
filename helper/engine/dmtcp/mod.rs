//! The dmtcp engine: DMTCP of the host, injected into the container, or the image's own.
//!
//! ```text
//! helper ─ relay thread ─ dmtcp_coordinator            on the host        relay.rs, protocol.rs
//!    │                                                 or in the image    contained.rs
//!    └── place: dmtcp_launch COMMAND | dmtcp_restart FILES…               mod.rs
//!          └── the application, each process connected to the relay       running.rs
//! ```
//!
//! DMTCP is found by [`installation`], its files are checked by [`image_file`], compressed
//! ones made plain by [`packed`]. In the working
//! directory of a run (`work`):
//!
//! ```text
//! images/        where DMTCP writes process images; emptied before every checkpoint
//! tmp/           DMTCP's own temporary files, with the application's environment in them
//! coordinator/   the coordinator's socket and log
//! from/          mount point of the generation that is restarted
//! meeting.json   rank 0 of several: where the others find it
//! …              of programs that start DMTCP by themselves: see contained.rs
//! ```
//!
//! With several ranks their working directories are beside each other, named `rank-0`, `rank-1`…, on
//! a file system that all of them see; rank 0 takes the process images of all.

mod contained;
mod foreign;
mod heap;
mod image_file;
pub mod installation;
mod packed;
mod peer;
mod protocol;
mod relay;
mod running;
#[cfg(test)]
mod tests;
pub mod within;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;

pub use self::foreign::{IMAGES_VERSION, bring, check, newest_set, processes_at};
use self::installation::{InstallError, Installation, Search};
use self::relay::{Coordinator, Relay};
use self::running::{Application, NotRunning};
use super::known::{self, Doubt};
use super::processes;
use super::{Engine, Kind, Placement, Running, Start, StartError};
use crate::container::inspect::{self, Facts, Glibc};
use crate::container::{Bind, INSIDE, INSIDE_WORK, Inside, Place};
use crate::runtime::{self, Runtime};
use crate::sys;

/// hwloc opens /sys in a way that DMTCP refuses, and ends the program (GROMACS, Open MPI…).
const HWLOC: (&str, &str) = ("HWLOC_COMPONENTS", "-linuxio,-pci");

/// What the name of a rank's directory begins with.
const RANK: &str = "rank-";

/// What speaks against a program with hwloc: that the user has taken over what hwloc looks at.
fn hwloc_doubt(libraries: &[String]) -> Option<Doubt> {
    let library = libraries.iter().find(|name| name.starts_with(LIBHWLOC))?;
    let names = [HWLOC.0, "APPTAINERENV_HWLOC_COMPONENTS"];
    let variable = names.iter().find(|name| std::env::var_os(name).is_some())?;
    Some(Doubt {
        cause: format!(
            "it is linked with {library}, and {variable} is set: DMTCP ends it at its start if hwloc \
             looks at devices in /sys"
        ),
        cure: format!("unset {variable}, which is then set so that hwloc does not"),
    })
}

/// Options of Apptainer that give a container another network than the node's, where the relay is.
const OWN_NETWORK: &[&str] = &["net", "netns-path"];

/// How the names of hwloc's files begin.
pub const LIBHWLOC: &str = "libhwloc.so";

/// The way out of what DMTCP cannot do.
const WAY_OUT: &str = "use --container-checkpoint-engine=criu";

/// DMTCP, found on this host or to be found in the container image.
#[derive(Debug)]
pub struct Dmtcp {
    /// Of this host. Empty only if there is none and the image's may do.
    installations: Vec<Installation>,
    /// Why it is empty.
    absent: String,
    /// Where it has to come from; the image decides as long as nobody else has.
    placement: Mutex<Option<Placement>>,
    /// What is used: the image's glibc, or the image itself, decides.
    used: Mutex<Option<Source>>,
    /// The version of the image's, once it was looked at.
    image_version: OnceLock<String>,
    /// What was found out for the last place and command, so that it is looked at once.
    known: Mutex<Option<(Place, Vec<OsString>, Fit)>>,
}

/// Where the DMTCP comes from that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// One of the installations on this host.
    Host(usize),
    Image,
}

/// How a DMTCP fits a place.
#[derive(Debug, Clone)]
struct Fit {
    source: Source,
    /// The directory of DMTCP's programs as seen in the place.
    bin: PathBuf,
    /// What `LD_LIBRARY_PATH` needs there.
    library_path: Option<OsString>,
    /// The libraries that the command is linked with.
    libraries: Vec<String>,
    /// Whether the command starts DMTCP by itself.
    by_itself: bool,
}

impl Dmtcp {
    /// Finds DMTCP as `search` says. One that may come from a container image (`placement` is not
    /// injected) need not be on this host.
    pub fn find(search: &Search, placement: Option<Placement>) -> Result<Dmtcp, InstallError> {
        let (installations, absent) = match installation::find(search) {
            Ok(found) => (found, String::new()),
            Err(why) if placement == Some(Placement::Injected) => return Err(why),
            Err(why) => (Vec::new(), why.to_string()),
        };
        Ok(Dmtcp {
            installations,
            absent,
            placement: Mutex::new(placement),
            used: Mutex::new(None),
            image_version: OnceLock::new(),
            known: Mutex::new(None),
        })
    }

    fn wanted(&self) -> Option<Placement> {
        *unpoisoned(&self.placement)
    }

    /// Finds the DMTCP that works for `command` in `place`, or why none does.
    fn fit(&self, place: &Place, command: &[OsString], runtime: &Path) -> Result<Fit, StartError> {
        let mut known = unpoisoned(&self.known);
        if let Some((its_place, its_command, fit)) = &*known
            && (its_place, its_command.as_slice()) == (place, command)
        {
            return Ok(fit.clone());
        }
        check_store(place, runtime)?;
        // Of a command that is one of DMTCP's ours is started, a script.
        let ours = command
            .first()
            .and_then(|first| contained::instead_of(Path::new(first)))
            .is_some_and(|_| matches!(place, Place::Apptainer(_)));
        let fit = match ours {
            true => {
                let script = [&["/bin/sh".into()], &command[1..]].concat();
                let fit = self.look(place, &script, runtime)?;
                Fit {
                    by_itself: true,
                    ..fit
                }
            }
            false => self.look(place, command, runtime)?,
        };
        *unpoisoned(&self.used) = Some(fit.source);
        *known = Some((place.clone(), command.to_vec(), fit.clone()));
        Ok(fit)
    }

    fn look(&self, place: &Place, command: &[OsString], runtime: &Path) -> Result<Fit, StartError> {
        let wanted = self.wanted();
        if self.installations.is_empty() || wanted == Some(Placement::Contained) {
            let facts = inspect::inspect(place, command, runtime, &[])
                .map_err(|error| StartError::Failed(error.to_string()))?;
            let fit = self.image_fit(place, &facts).map_err(StartError::Unable)?;
            let Some(fit) = fit else {
                return Err(StartError::Missing(match wanted {
                    Some(Placement::Contained) => {
                        "the container image has no DMTCP of its own: there is no dmtcp_launch in \
                         its PATH; use --container-checkpoint-placement=auto, or install DMTCP in \
                         the image"
                            .to_owned()
                    }
                    _ => self.absent.clone(),
                }));
            };
            return holdable(command, &facts).map(|_| fit);
        }
        let missing = |error: InstallError| StartError::Missing(error.to_string());
        let look = |index: usize| -> Result<(PathBuf, Facts), StartError> {
            let installation = &self.installations[index];
            let tree = match (place, installation.bin_in_place()) {
                (Place::Bare, Some(bin)) => bin.parent().unwrap_or(&bin).to_path_buf(),
                _ => place
                    .programs(runtime)
                    .join(installation.stage(runtime).map_err(missing)?),
            };
            let objects = ["bin/dmtcp_launch", "bin/dmtcp_restart"].map(|name| tree.join(name));
            let facts = inspect::inspect(place, command, runtime, &objects)
                .map_err(|error| StartError::Failed(error.to_string()))?;
            Ok((tree, facts))
        };
        let (mut tree, mut facts) = look(0)?;
        let glibc = holdable(command, &facts)?;
        if wanted.is_none() {
            match self.image_fit(place, &facts) {
                Ok(Some(fit)) => return Ok(fit),
                Ok(None) => {}
                Err(why) => log::warn!("{why}; this node's DMTCP is used instead"),
            }
        }
        let index = self.choose(glibc)?;
        if index != 0 {
            (tree, facts) = look(index)?;
        }
        let installation = &self.installations[index];
        if let Some(library) = facts.missing.iter().find(|name| !installation.brings(name)) {
            return Err(StartError::Missing(format!(
                "DMTCP needs {library}, found neither in the container nor on the host"
            )));
        }
        let too_new = facts.missing.iter().find_map(|library| {
            let needs = installation
                .needs_of(library)
                .filter(|needs| *needs > glibc)?;
            Some((library, needs))
        });
        if let Some((library, needs)) = too_new {
            return Err(StartError::Unable(format!(
                "the container image lacks {library}, which DMTCP needs, and this node's needs glibc \
                 {}.{} while the image has {}.{}; add {library} to the image, install a DMTCP that \
                 was configured with --enable-static-libstdcxx, or {WAY_OUT}",
                needs.0, needs.1, glibc.0, glibc.1
            )));
        }
        if let Some(said) = facts.refused {
            return Err(StartError::Unable(format!(
                "DMTCP does not start in the container: {said}; {WAY_OUT}"
            )));
        }
        Ok(Fit {
            source: Source::Host(index),
            bin: tree.join("bin"),
            library_path: installation.library_path(&tree, &facts.missing),
            libraries: facts.libraries,
            by_itself: facts.starts_dmtcp,
        })
    }

    /// How the image's own DMTCP fits, nothing where it has none; or why it does not.
    fn image_fit(&self, place: &Place, facts: &Facts) -> Result<Option<Fit>, String> {
        let (Place::Apptainer(apptainer), Some(own)) = (place, &facts.dmtcp) else {
            return Ok(None);
        };
        let unable = |why: String| {
            Err(format!(
                "the DMTCP of the container image {} ({}) {why}",
                apptainer.image.display(),
                own.bin.display()
            ))
        };
        match &own.version {
            Ok(version) if installation::supported(version) => {
                // An image is looked at more than once and stays the same.
                let _ = self.image_version.set(version.clone());
                Ok(Some(Fit {
                    source: Source::Image,
                    bin: own.bin.clone(),
                    library_path: None,
                    libraries: facts.libraries.clone(),
                    by_itself: facts.starts_dmtcp,
                }))
            }
            Ok(version) => unable(format!(
                "is version {version}, and versions 4.0 to 4.2 are supported"
            )),
            Err(said) => unable(format!("does not run: {said}")),
        }
    }

    /// The installation that needs the newest glibc of those that `glibc` satisfies.
    fn choose(&self, glibc: Glibc) -> Result<usize, StartError> {
        self.installations
            .iter()
            .enumerate()
            .filter(|(_, installation)| installation.glibc <= glibc)
            .max_by_key(|(_, installation)| installation.glibc)
            .map(|(index, _)| index)
            .ok_or_else(|| {
                let needs: Vec<String> = self
                    .installations
                    .iter()
                    .map(|one| {
                        format!(
                            "DMTCP {} needs glibc {}.{}",
                            one.version, one.glibc.0, one.glibc.1
                        )
                    })
                    .collect();
                StartError::Unable(format!(
                    "the container image has glibc {}.{} and {}; install a DMTCP that was built \
                     with an older glibc, or {WAY_OUT}",
                    glibc.0,
                    glibc.1,
                    needs.join(", ")
                ))
            })
    }
}

/// What a thread that panicked left is whole: these are only ever replaced.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses a store on an overlay with a SIF image. Apptainer mounts that with FUSE; a write to an
/// overlay is done in the name of whoever mounted the overlay, FUSE denies that user the pages of
/// the image, and DMTCP, which writes them from where they are mapped, ends the application at its
/// first checkpoint (seen with Linux 6.18, Apptainer 1.4.5).
fn check_store(place: &Place, runtime: &Path) -> Result<(), StartError> {
    let Place::Apptainer(apptainer) = place else {
        return Ok(());
    };
    let on_overlay = nix::sys::statfs::statfs(runtime)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC);
    if on_overlay && apptainer.image.is_file() {
        return Err(StartError::Unable(format!(
            "DMTCP cannot save programs of the SIF image {} into the store, which is on an overlay \
             file system; choose a store on another (--container-checkpoint-dir) or use a sandbox \
             directory as the image",
            apptainer.image.display()
        )));
    }
    Ok(())
}

/// Whether DMTCP can hold a program of which `facts` are known; its glibc if so.
pub fn holdable(command: &[OsString], facts: &Facts) -> Result<Glibc, StartError> {
    let name = command
        .first()
        .map(|word| word.to_string_lossy().into_owned())
        .unwrap_or_default();
    let program = match (facts.interpreters.last(), &facts.program) {
        (Some(last), _) => format!("{name} (run by {})", last.display()),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => name,
    };
    let unable = |why: &str| {
        Err(StartError::Unable(format!(
            "DMTCP cannot hold {program}: {why}; {WAY_OUT}"
        )))
    };
    match &facts.kind {
        inspect::Kind::NotFound => Err(StartError::Failed(format!(
            "{program} is not found; check the command and the container image"
        ))),
        inspect::Kind::NotExecutable(why) => {
            Err(StartError::Failed(format!("cannot run {program}: {why}")))
        }
        inspect::Kind::Foreign => Err(StartError::Failed(format!(
            "cannot run {program}: it is made for another machine"
        ))),
        _ if facts.setuid => unable("it runs with another user's rights (setuid or setgid)"),
        inspect::Kind::Static if facts.go => unable("a Go program, linked statically"),
        inspect::Kind::Static => unable("it is linked statically"),
        inspect::Kind::Musl => unable("its libc is musl, not glibc"),
        inspect::Kind::Dynamic { glibc: None, .. } => unable("its libc is not a glibc"),
        inspect::Kind::Dynamic {
            glibc: Some(glibc), ..
        } => Ok(*glibc),
    }
}

impl Engine for Dmtcp {
    fn kind(&self) -> Kind {
        Kind::Dmtcp
    }

    fn version(&self) -> &str {
        match (*unpoisoned(&self.used), self.wanted()) {
            (Some(Source::Image), _) | (None, Some(Placement::Contained)) => {
                self.image_version.get().map_or("", String::as_str)
            }
            (Some(Source::Host(index)), _) => &self.installations[index].version,
            (None, _) => self.installations.first().map_or("", |one| &one.version),
        }
    }

    fn placement(&self) -> Option<Placement> {
        match *unpoisoned(&self.used) {
            Some(Source::Host(_)) => Some(Placement::Injected),
            Some(Source::Image) => Some(Placement::Contained),
            None => self.wanted(),
        }
    }

    fn restrict(&self, placement: Placement) -> Result<(), StartError> {
        match self.wanted() {
            Some(other) if other != placement => {
                return Err(StartError::Unable(format!(
                    "DMTCP was {placement} then and is to be {other} now \
                     (--container-checkpoint-placement)"
                )));
            }
            _ if placement == Placement::Injected && self.installations.is_empty() => {
                return Err(StartError::Missing(self.absent.clone()));
            }
            _ => {}
        }
        *unpoisoned(&self.placement) = Some(placement);
        // What was found out may be of the other placement.
        *unpoisoned(&self.known) = None;
        *unpoisoned(&self.used) = None;
        Ok(())
    }

    fn can_hold(
        &self,
        place: &Place,
        command: &[OsString],
        runtime: &Path,
    ) -> Result<Vec<Doubt>, StartError> {
        if let Place::Apptainer(apptainer) = place
            && let Some(option) = OWN_NETWORK.iter().find(|o| apptainer.flags.contains(**o))
        {
            return Err(StartError::Unable(format!(
                "DMTCP cannot reach its coordinator from a container that has a network of its own \
                 (--{option}); leave that out, or {WAY_OUT}"
            )));
        }
        let fit = self.fit(place, command, runtime)?;
        let mut doubts = known::doubts(Kind::Dmtcp, &fit.libraries);
        doubts.extend(hwloc_doubt(&fit.libraries));
        Ok(doubts)
    }

    fn start(&self, start: &Start, limit: Duration) -> Result<Arc<dyn Running>, StartError> {
        let fit = self.fit(&start.place, &start.probe, &start.runtime)?;
        let failed = |what: &str, path: &Path, error: &dyn std::fmt::Display| {
            StartError::Failed(format!("cannot {what} {}: {error}", path.display()))
        };
        for dir in ["images", "tmp", "coordinator", "from"] {
            let dir = start.work.join(dir);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(|error| failed("make the directory", &dir, &error))?;
        }
        // Where a batch script was put, which the probe has not seen.
        let by_itself = match &start.from {
            Some(from) => contained::by_itself(from),
            None => {
                let script = start.work.join("script");
                let in_container = matches!(start.place, Place::Apptainer(_));
                fit.by_itself || (in_container && inspect::script_starts_dmtcp(&script))
            }
        };
        let held_shell = !by_itself && is_held_shell(start);
        if !by_itself {
            super::refuse_typed(&start.command)?;
        }
        heap::stage(&start.runtime)
            .map_err(|error| failed("write a library into", &start.runtime, &error))?;
        if by_itself || held_shell {
            contained::stage(&start.runtime)
                .map_err(|error| failed("write programs below", &start.runtime, &error))?;
        }
        let coordinator = start.work.join("coordinator");
        let program = match (fit.source, &start.place) {
            (Source::Image, Place::Apptainer(apptainer)) => {
                let bin = &fit.bin;
                let command = contained::coordinator(apptainer, &start.runtime, bin, &coordinator);
                Coordinator {
                    command,
                    in_container: true,
                }
            }
            (Source::Host(index), _) => {
                let program = self.installations[index].coordinator();
                Coordinator {
                    command: relay::on_host(program, &coordinator),
                    in_container: false,
                }
            }
            (Source::Image, Place::Bare) => {
                return Err(StartError::Failed("there is no container image".to_owned()));
            }
        };
        let ranks = &start.ranks;
        let meeting = of_rank(&start.work, 0).join("meeting.json");
        let relay = match ranks.rank {
            0 => Relay::start(
                program,
                &coordinator,
                (ranks.count > 1).then_some(&meeting),
                ranks.one_node,
            ),
            _ => Relay::join(&meeting, &coordinator.join("relay.log"), limit),
        }
        .map_err(|error| StartError::Failed(error.to_string()))?;

        let saved = match &start.from {
            None => None,
            Some(from) => Some(Saved::read(from).map_err(StartError::Failed)?),
        };
        if let Some(from) = &start.from {
            seek_to_end();
            bring_copies(from, &start.work.join("images"))
                .map_err(|error| failed("copy what belongs to", from, &error))?;
            contained::copy(from, &start.work)
                .map_err(|error| failed("copy what belongs to", from, &error))?;
        }
        let wish = match by_itself || held_shell {
            true => contained::Wish::of(&start.work)
                .map_err(|error| failed("watch", &start.work, &error))
                .map(Some)?,
            false => None,
        };
        if by_itself {
            let lines = |saved| dmtcp_line(start, &fit, relay.port(), saved);
            let restart = saved.as_ref().map(|saved| lines(Some(saved)));
            let restart = start.from.as_deref().zip(restart.as_deref());
            contained::leave_word(&start.work, relay.port(), &lines(None), restart)
                .map_err(|error| failed("write into", &start.work, &error))?;
        }
        let mut command = command(start, &fit, relay.port(), saved.as_ref(), by_itself);
        let child = command
            .spawn()
            .map_err(|error| failed("start", Path::new(command.get_program()), &error))?;
        let child = Pid::from_raw(child.id().cast_signed());
        watch(child, relay.on_child_end());

        if let Some(saved) = &saved
            && let Err(error) = running::until_running(&relay, saved.peers, limit)
            && !(matches!(error, NotRunning::Ended) && running::has_run(&relay, saved.peers))
        {
            processes::kill_all(&processes::tree(child));
            let status = waitpid(child, None);
            return Err(StartError::Failed(match (error, status) {
                (NotRunning::Ended, Ok(status)) => format!(
                    "DMTCP's restart ended before the application ran ({status:?}); what it said is \
                     on standard error"
                ),
                (error, _) => format!("DMTCP's restart failed: {error}"),
            }));
        }
        Ok(Arc::new(Application {
            child,
            relay: Mutex::new(relay),
            images: match (ranks.rank, ranks.count) {
                (0, 1) => vec![start.work.join("images")],
                (0, count) => (0..count)
                    .map(|rank| of_rank(&start.work, rank).join("images"))
                    .collect(),
                _ => Vec::new(),
            },
            over: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
            coordinator_lost: AtomicBool::new(false),
            wish,
            by_itself,
        }))
    }

    /// With several ranks the set is all of them: the other ranks' directories are beside `files`.
    fn verify(&self, files: &Path) -> Result<(), String> {
        verify(files).map_err(|fault| fault.to_string())
    }
}

/// The working directory of another rank: those of all ranks are beside each other.
fn of_rank(work: &Path, rank: u32) -> PathBuf {
    work.with_file_name(format!("{RANK}{rank}"))
}

fn verify(files: &Path) -> Result<(), image_file::Fault> {
    let mut list = image_file::list(files, image_file::SUFFIX)?;
    let mut headers = Vec::new();
    for file in &list {
        headers.push(image_file::walk(file)?);
    }
    for rank in 0.. {
        let other = of_rank(files, rank);
        if !other.is_dir() {
            break;
        }
        if other == files {
            continue;
        }
        for file in image_file::list(&other, image_file::SUFFIX)? {
            headers.push(image_file::header(&file)?);
            list.push(file);
        }
    }
    image_file::one_set(&list, &headers)
}

/// Puts output that is appended to a file at its end. DMTCP gives a restored process the flags that
/// its streams had, without O_APPEND if they had none, and it would write over the file's beginning.
fn seek_to_end() {
    use nix::unistd::{Whence, lseek};
    // Fails for whatever has no position, and then there is nothing to do.
    let _ = lseek(std::io::stdout(), 0, Whence::SeekEnd);
    let _ = lseek(std::io::stderr(), 0, Whence::SeekEnd);
}

/// Copies what DMTCP kept of the application's files (see [`running::copies`]) to where it was when
/// it was saved. Copies, because the next checkpoint writes there.
fn bring_copies(from: &Path, images: &Path) -> std::io::Result<()> {
    for dir in running::copies(from)? {
        copy_tree(&dir, &images.join(dir.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

/// The process images of one rank of a generation.
struct Saved {
    dir: PathBuf,
    /// Names; a process without a parent in the set comes first.
    names: Vec<OsString>,
    peers: u32,
}

impl Saved {
    fn read(dir: &Path) -> Result<Saved, String> {
        let files = image_file::list(dir, image_file::SUFFIX).map_err(|fault| fault.to_string())?;
        let mut found = Vec::new();
        for file in files {
            let header = image_file::header(&file).map_err(|fault| fault.to_string())?;
            found.push((!header.root, header.process.pid, file, header.peers));
        }
        found.sort();
        let Some((_, _, _, peers)) = found.first() else {
            return Err(format!("there is no process image in {}", dir.display()));
        };
        Ok(Saved {
            dir: dir.into(),
            peers: *peers,
            names: found
                .iter()
                .filter_map(|(_, _, file, _)| Some(file.file_name()?.to_owned()))
                .collect(),
        })
    }
}

/// DMTCP's own command line to launch, up to the command, or to restart under the coordinator at
/// `port`.
fn dmtcp_line(start: &Start, fit: &Fit, port: u16, saved: Option<&Saved>) -> Vec<OsString> {
    let work = start.place.work(&start.work);
    let program = match saved {
        None => "dmtcp_launch",
        Some(_) => "dmtcp_restart",
    };
    let mut argv: Vec<OsString> = vec![fit.bin.join(program).into()];
    argv.extend(
        [
            "--join-coordinator",
            "--coord-host",
            "127.0.0.1",
            "--coord-port",
        ]
        .map(Into::into),
    );
    argv.push(port.to_string().into());
    argv.extend([
        "--quiet".into(),
        "--ckptdir".into(),
        work.join("images").into(),
    ]);
    argv.extend(["--tmpdir".into(), work.join("tmp").into()]);
    match saved {
        None => {
            let heap = start.place.programs(&start.runtime).join(heap::LIBRARY);
            argv.extend(["--no-gzip".into(), "--with-plugin".into(), heap.into()]);
        }
        Some(saved) => {
            let dir = match start.place {
                Place::Bare => saved.dir.clone(),
                Place::Apptainer(_) => work.join("from"),
            };
            argv.extend(saved.names.iter().map(|name| dir.join(name).into()));
        }
    }
    argv
}

/// Whether a command that does not start DMTCP itself is a shell that may be told to.
fn is_held_shell(start: &Start) -> bool {
    matches!(start.place, Place::Apptainer(_)) && inspect::reads_commands(&start.command)
}

/// The command that launches or restarts the application under the coordinator at `port`, or lets it
/// do that by itself.
fn command(start: &Start, fit: &Fit, port: u16, saved: Option<&Saved>, by_itself: bool) -> Command {
    let work = start.place.work(&start.work);
    // One that calls DMTCP by itself sets its limits anew before it does.
    let restarts = saved.is_some() && !by_itself;
    let mut argv = match by_itself {
        true => Vec::new(),
        false => dmtcp_line(start, fit, port, saved),
    };
    if by_itself || saved.is_none() {
        // No "--": DMTCP refuses it.
        let mut words = start.command.iter().cloned();
        let first = words.next().map(|program| {
            let ours = by_itself.then(|| contained::instead_of(Path::new(&program)));
            ours.flatten().map_or(program, Into::into)
        });
        argv.extend(first);
        argv.extend(words);
    }

    let mut inside = Inside {
        env: start.env.clone(),
        ..Inside::default()
    };
    match start.place {
        Place::Bare => {
            inside.argv = argv;
            if std::env::var_os(HWLOC.0).is_none() {
                inside.env.push((HWLOC.0.into(), HWLOC.1.into()));
            }
        }
        Place::Apptainer(_) => {
            inside.argv = Runtime::argv(start.place.programs(&start.runtime), runtime::HELPER);
            inside.argv.push(within::WITHIN.into());
            if restarts {
                inside.argv.push(within::RAISE_LIMITS.into());
            }
            if let Some(path) = &fit.library_path {
                let mut variable = OsString::from("LD_LIBRARY_PATH=");
                variable.push(path);
                inside.argv.extend(["--append".into(), variable]);
            }
            let variable = |name: &str, value: &OsStr| {
                let mut variable = OsString::from(name);
                variable.push("=");
                variable.push(value);
                variable
            };
            if by_itself {
                let names = Path::new(INSIDE).join(contained::NAMES);
                let path = variable("PATH", names.as_os_str());
                let dir = variable("DMTCP_CHECKPOINT_DIR", work.join("images").as_os_str());
                inside
                    .argv
                    .extend(["--prepend".into(), path, "--set".into(), dir]);
            } else if is_held_shell(start) {
                for (name, text) in contained::functions() {
                    let function = variable(&name, OsStr::new(&text));
                    inside.argv.extend(["--set".into(), function]);
                }
            }
            let hwloc = format!("{}={}", HWLOC.0, HWLOC.1);
            inside
                .argv
                .extend(["--default".into(), hwloc.into(), "--".into()]);
            inside.argv.append(&mut argv);
            let bind = |host: &Path, inside: PathBuf, writable| Bind {
                host: host.into(),
                inside,
                writable,
            };
            inside.binds = vec![
                bind(&start.runtime, INSIDE.into(), false),
                bind(&start.work, INSIDE_WORK.into(), true),
            ];
            if let Some(saved) = saved {
                inside
                    .binds
                    .push(bind(&saved.dir, Path::new(INSIDE_WORK).join("from"), false));
                for (copies, seen_at) in foreign::copies(&saved.dir, &start.work.join("images")) {
                    inside.binds.push(bind(&copies, seen_at, true));
                }
            }
            // Without it a restart of several ranks may hang; --cleanenv takes it away.
            if let Some(job) = std::env::var_os("SLURM_JOB_ID") {
                inside.env.push(("SLURM_JOB_ID".into(), job));
            }
        }
    }
    let mut command = start.place.command(&inside);
    // What a user set for DMTCP elsewhere would lead this one astray.
    for (name, _) in std::env::vars_os() {
        let wish = by_itself && name == contained::INTERVAL_VARIABLE;
        if name.to_string_lossy().starts_with("DMTCP_") && !wish {
            command.env_remove(name);
        }
    }
    let raises_limits = restarts && matches!(start.place, Place::Bare);
    sys::before_exec(&mut command, move || {
        relay::raise_open_files()?;
        if raises_limits {
            within::raise_limits()?;
        }
        sys::close_from(3)
    });
    command
}

/// Announces the end of `child` without taking it from whoever reaps it.
fn watch(child: Pid, announce: impl FnOnce() + Send + 'static) {
    let wait = move || {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while let Err(nix::errno::Errno::EINTR) = waitid(Id::Pid(child), flags) {}
        announce();
    };
    if let Err(error) = std::thread::Builder::new()
        .name("dmtcp-watch".into())
        .spawn(wait)
    {
        log::error!("cannot start a thread that waits for the application: {error}");
    }
}
