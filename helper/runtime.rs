//! The directory of programs that is bound into containers.
//!
//! A container image may hold any libc or none that suits us, so our programs bring their own
//! dynamic loader and libraries and are started through them ([`Runtime::argv`]). They run in any
//! image of this machine's architecture, musl and empty ones included.
//!
//! ```text
//! BASE/.runtime/                  0700
//!   3f9a…/                        one set of programs; named by a hash over its sources
//!     bin/container-checkpoint    this helper
//!     bin/criu                    if asked for
//!     lib/ld-linux-x86-64.so.2    the dynamic loader, and every library that the two need
//!     lib/ld-criu.so              the loader again, for CRIU
//!     client                      for applications: a script that starts this helper as their client
//!     work/                       empty: the mount point of an engine's working directory
//!     contents.json               size and BLAKE3 of every file in bin/ and lib/
//!     used                        touched by every use
//!     …                           whatever other rooms add; left alone
//! ```
//!
//! Contract: what [`Runtime::prepare`] returns is whole and was checked just now. A new set is made
//! beside and renamed into place, so several helpers on several nodes may do it at once; a file of a
//! set that turns out damaged is replaced by rename. Sets that nobody used for [`UNUSED`] are
//! removed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use object::read::elf::{FileHeader, ProgramHeader};
use serde::{Deserialize, Serialize};

/// The name under which the helper itself is in the set; for [`Runtime::argv`].
pub const HELPER: &str = "container-checkpoint";

/// The name under which CRIU is in the set; for [`Runtime::argv`].
pub const CRIU: &str = "criu";

/// The name under which the script is in the set by which applications ask this helper.
pub const CLIENT: &str = "client";

/// That script; see `socket`.
const CLIENT_TEXT: &str = include_str!("socket/client.sh");

/// Libraries of glibc that the helper may not need but what is preloaded into its client may. Those
/// of an image belong to another libc.
const OF_GLIBC: &[&str] = &["libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"];

/// The file name of the dynamic loader, as the ABI fixes it.
#[cfg(target_arch = "x86_64")]
const LOADER: &str = "ld-linux-x86-64.so.2";
#[cfg(target_arch = "aarch64")]
const LOADER: &str = "ld-linux-aarch64.so.1";

/// CRIU's own copy of the loader. A process that it restores begins as CRIU itself, and the kernel
/// refuses to make it another program while it maps the file that CRIU was started from
/// (prctl(2), PR_SET_MM_EXE_FILE): the helper, as part of an application, maps [`LOADER`].
const CRIU_LOADER: &str = "ld-criu.so";

/// How long a set stays after its last use: longer than any job runs.
const UNUSED: Duration = Duration::from_secs(180 * 24 * 3600);

/// How long a set may be in the making before what is left of it is swept.
const MAKING: Duration = Duration::from_secs(24 * 3600);

/// Prefix of sets in the making.
const PARTIAL: &str = ".making-";

/// Largest `contents.json` that is read back, in bytes.
const CONTENTS_MAX: u64 = 1 << 20;

/// Why the programs could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    // Not its source: it would be told twice.
    #[error("cannot {what} {path}: {why}")]
    Io {
        what: &'static str,
        path: PathBuf,
        why: io::Error,
    },
    #[error(
        "cannot bring {program} into containers: {reason}; a dynamically linked program for glibc \
         is needed"
    )]
    Program { program: PathBuf, reason: String },
    #[error("cannot keep programs under {path}: {reason}; choose another directory as the store")]
    Unfit { path: PathBuf, reason: &'static str },
}

/// A prepared set of programs.
#[derive(Debug, Clone)]
pub struct Runtime {
    dir: PathBuf,
}

/// One file of a set: where it comes from and where it goes, e.g. `lib/libc.so.6`.
#[derive(Debug)]
struct Source {
    from: PathBuf,
    to: String,
}

/// What `contents.json` says of one file.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    file: String,
    size: u64,
    blake3: String,
}

impl Runtime {
    /// Finds or makes the set that holds this helper and, if given, the program `criu`, below
    /// `base/.runtime`. `base` is an existing directory of the user, usually the store's.
    ///
    /// # Errors
    /// When a program is not an ELF program for the glibc of this host, the directory cannot be
    /// written, or programs cannot be run from it.
    pub fn prepare(base: &Path, criu: Option<&Path>) -> Result<Runtime, RuntimeError> {
        // A colon would split --library-path and --bind, a comma --bind.
        if base
            .as_os_str()
            .as_bytes()
            .iter()
            .any(|b| b":;,\"\\".contains(b))
        {
            return unfit(base, "its path has one of : ; , \" \\ in it");
        }
        let home = base.join(".runtime");
        make_dir(&home)?;
        match nix::sys::statvfs::statvfs(&home) {
            Ok(stat) if stat.flags().contains(nix::sys::statvfs::FsFlags::ST_NOEXEC) => {
                return unfit(base, "its file system is mounted noexec");
            }
            Ok(_) => {}
            Err(errno) => return Err(failed("examine the file system of", &home)(errno.into())),
        }

        let sources = sources(criu)?;
        let dir = home.join(key(&sources)?);
        if fs::symlink_metadata(&dir).is_err() {
            make(&home, &dir, &sources)?;
        }
        let bad = damaged(&dir, &sources);
        if !bad.is_empty() {
            log::warn!(
                "{}: {} of the programs were damaged, made anew",
                dir.display(),
                bad.len()
            );
            fill(&dir, &sources, &bad)?;
        }
        let used = dir.join("used");
        fs::write(&used, b"").map_err(failed("write", &used))?;
        prune(&home, &dir);
        Ok(Runtime { dir })
    }

    /// The set's directory on the host. Other rooms may add subdirectories of their own; `bin`,
    /// `lib` and `work` are this room's.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The start of a command line that runs `program` ([`HELPER`] or [`CRIU`]) where the set is
    /// seen as `programs`. Arguments of the program follow.
    pub fn argv(programs: &Path, program: &str) -> Vec<OsString> {
        let lib = programs.join("lib");
        let loader = if program == CRIU { CRIU_LOADER } else { LOADER };
        vec![
            lib.join(loader).into(),
            // The image's cache would name libraries of another libc.
            "--inhibit-cache".into(),
            "--library-path".into(),
            lib.into(),
            programs.join("bin").join(program).into(),
        ]
    }
}

fn unfit<T>(path: &Path, reason: &'static str) -> Result<T, RuntimeError> {
    Err(RuntimeError::Unfit {
        path: path.into(),
        reason,
    })
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeError {
    let path = path.to_path_buf();
    move |why| RuntimeError::Io { what, path, why }
}

/// Makes a directory that only the user can read, if it is not there.
fn make_dir(dir: &Path) -> Result<(), RuntimeError> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        other => other.map_err(failed("make the directory", dir)),
    }
}

/// Every file of the set: the programs and what the loader finds for them.
fn sources(criu: Option<&Path>) -> Result<Vec<Source>, RuntimeError> {
    let this = Path::new("/proc/self/exe");
    let this = fs::read_link(this).map_err(failed("read", this))?;
    let mut sources = Vec::new();
    for (program, name) in [
        Some((this.as_path(), HELPER)),
        criu.map(|criu| (criu, CRIU)),
    ]
    .into_iter()
    .flatten()
    {
        sources.push(Source {
            from: program.to_path_buf(),
            to: format!("bin/{name}"),
        });
        for library in libraries(program)? {
            let name = library
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if program != this && name == LOADER {
                sources.push(Source {
                    from: library.clone(),
                    to: format!("lib/{CRIU_LOADER}"),
                });
            }
            let to = format!("lib/{name}");
            // Both programs need libc: the first one's is taken. They come from one host.
            if !sources.iter().any(|source| source.to == to) {
                sources.push(Source { from: library, to });
            }
        }
    }
    Ok(sources)
}

/// The dynamic loader of `program` and the libraries that the loader finds for it.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, RuntimeError> {
    let refuse = |reason: String| RuntimeError::Program {
        program: program.into(),
        reason,
    };
    let loader = interpreter(program)?;
    if loader.file_name() != Some(OsStr::new(LOADER)) {
        return Err(refuse(format!(
            "its dynamic loader is {}, not {LOADER}",
            loader.display()
        )));
    }
    // The user's own LD_ variables are for the application, not for our programs.
    let out = Command::new(&loader)
        .arg("--list")
        .arg(program)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(failed("run the dynamic loader", &loader))?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        return Err(refuse(format!("the dynamic loader says: {}", text.trim())));
    }
    let mut found = vec![loader];
    for line in out.stdout.split(|b| *b == b'\n') {
        // "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)", and two forms without an
        // arrow for the vDSO and the loader.
        let Some(at) = line.windows(4).position(|w| w == b" => ") else {
            continue;
        };
        let path = &line[at + 4..];
        let end = path
            .windows(2)
            .rposition(|w| w == b" (")
            .unwrap_or(path.len());
        let path = Path::new(OsStr::from_bytes(&path[..end]));
        if !path.is_absolute() {
            let line = String::from_utf8_lossy(line);
            return Err(refuse(format!(
                "one of its libraries is missing: {}",
                line.trim()
            )));
        }
        if path.file_name() != Some(OsStr::new(LOADER)) {
            found.push(path.to_path_buf());
        }
    }
    let libc = found
        .iter()
        .find(|path| path.ends_with("libc.so.6"))
        .cloned();
    for name in OF_GLIBC {
        let beside = libc.as_ref().map(|libc| libc.with_file_name(name));
        found.extend(beside.filter(|path| path.exists() && !found.contains(path)));
    }
    Ok(found)
}

/// The dynamic loader that an ELF program asks for.
fn interpreter(program: &Path) -> Result<PathBuf, RuntimeError> {
    let refuse = |reason: &str| RuntimeError::Program {
        program: program.into(),
        reason: reason.into(),
    };
    let file = File::open(program).map_err(failed("open", program))?;
    let data = object::ReadCache::new(file);
    let parse = || -> object::read::Result<Option<PathBuf>> {
        let header = object::elf::FileHeader64::<object::Endianness>::parse(&data)?;
        let endian = header.endian()?;
        for segment in header.program_headers(endian, &data)? {
            if let Some(path) = segment.interpreter(endian, &data)? {
                return Ok(Some(PathBuf::from(OsStr::from_bytes(path))));
            }
        }
        Ok(None)
    };
    match parse() {
        Ok(Some(loader)) => Ok(loader),
        Ok(None) => Err(refuse("it is statically linked")),
        Err(_) => Err(refuse("it is not a 64-bit ELF program")),
    }
}

/// The name of the set with these sources: changes when one of them was replaced.
fn key(sources: &[Source]) -> Result<String, RuntimeError> {
    let mut hasher = blake3::Hasher::new();
    for source in sources {
        let about = fs::metadata(&source.from).map_err(failed("examine", &source.from))?;
        hasher.update(source.to.as_bytes()).update(&[0]);
        hasher
            .update(source.from.as_os_str().as_bytes())
            .update(&[0]);
        for number in [about.len() as i64, about.mtime(), about.mtime_nsec()] {
            hasher.update(&number.to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex()[..16].to_string())
}

/// Makes a new set beside and moves it to `dir`. If another helper was faster, its set stays.
fn make(home: &Path, dir: &Path, sources: &[Source]) -> Result<(), RuntimeError> {
    let partial = tempfile::Builder::new()
        .prefix(PARTIAL)
        .tempdir_in(home)
        .map_err(failed("make a directory in", home))?;
    let all: Vec<&Source> = sources.iter().collect();
    fill(partial.path(), sources, &all)?;
    match fs::rename(partial.path(), dir) {
        Ok(()) => {
            let _moved = partial.keep();
            Ok(())
        }
        // The temporary directory is removed when it goes out of scope.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => {
            Ok(())
        }
        Err(why) => Err(RuntimeError::Io {
            what: "move the new programs to",
            path: dir.into(),
            why,
        }),
    }
}

/// Puts the files `which` into `dir`, each whole or not at all, then the record of all of them.
fn fill(dir: &Path, sources: &[Source], which: &[&Source]) -> Result<(), RuntimeError> {
    for sub in ["bin", "lib", "work"] {
        make_dir(&dir.join(sub))?;
    }
    for source in which {
        // What this process was started from may have been replaced since: the link still leads
        // to it, the path may not.
        let from = match source.to.strip_prefix("bin/") {
            Some(HELPER) => Path::new("/proc/self/exe"),
            _ => &source.from,
        };
        let mut from_file = File::open(from).map_err(failed("open", from))?;
        replace(&dir.join(&source.to), 0o500, |to| {
            io::copy(&mut from_file, to).map(|_| ())
        })?;
    }
    replace(&dir.join(CLIENT), 0o500, |to| {
        to.write_all(client().as_bytes())
    })?;
    let mut contents = Vec::new();
    for source in sources {
        let path = dir.join(&source.to);
        let (size, blake3) = digest(&path).map_err(failed("read", &path))?;
        contents.push(Content {
            file: source.to.clone(),
            size,
            blake3,
        });
    }
    let text = serde_json::to_vec_pretty(&contents)
        .map_err(|error| failed("describe", dir)(io::Error::other(error)))?;
    replace(&dir.join("contents.json"), 0o600, |to| to.write_all(&text))
}

/// Writes a file beside its place, syncs it and moves it there.
fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), RuntimeError> {
    let write_all = || -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .prefix(PARTIAL)
            .make_in(dir, |path| {
                OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(mode)
                    .open(path)
            })?;
        write(file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write_all().map_err(failed("write", path))
}

/// The text of the client.
fn client() -> String {
    CLIENT_TEXT.replace("@LOADER@", LOADER)
}

/// Size and BLAKE3 of a file.
fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut hasher = blake3::Hasher::new();
    let size = io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok((size, hasher.finalize().to_hex().to_string()))
}

/// The files of the set in `dir` that are not as its record says; all of them without a record.
fn damaged<'a>(dir: &Path, sources: &'a [Source]) -> Vec<&'a Source> {
    let record = dir.join("contents.json");
    let contents: Vec<Content> = fs::metadata(&record)
        .ok()
        .filter(|about| about.len() <= CONTENTS_MAX)
        .and_then(|_| fs::read(&record).ok())
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let whole = |source: &Source| {
        contents
            .iter()
            .find(|content| content.file == source.to)
            .is_some_and(|content| {
                digest(&dir.join(&source.to))
                    .is_ok_and(|(size, blake3)| size == content.size && blake3 == content.blake3)
            })
    };
    let bad: Vec<&Source> = sources.iter().filter(|source| !whole(source)).collect();
    // A lost mount point and the client are put back by the same way as a damaged file.
    let client_is_good = fs::read(dir.join(CLIENT)).is_ok_and(|text| text == client().as_bytes());
    if bad.is_empty() && !(client_is_good && dir.join("work").is_dir()) {
        sources.iter().take(1).collect()
    } else {
        bad
    }
}

/// Removes sets that were not used for long. Room that cannot be won back now is won back another
/// time, so that this never keeps a job from its start.
fn prune(home: &Path, current: &Path) {
    let now = SystemTime::now();
    let older = |path: &Path, limit: Duration| {
        fs::symlink_metadata(path)
            .and_then(|about| about.modified())
            .is_ok_and(|time| now.duration_since(time).is_ok_and(|age| age > limit))
    };
    let entries = match fs::read_dir(home) {
        Ok(entries) => entries,
        Err(error) => return log::warn!("cannot list {}: {error}", home.display()),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let stale = if entry.file_name().as_bytes().starts_with(PARTIAL.as_bytes()) {
            older(&path, MAKING)
        } else {
            path != current && older(&path, MAKING) && older(&path.join("used"), UNUSED)
        };
        if stale && let Err(error) = fs::remove_dir_all(&path) {
            log::warn!(
                "cannot remove the unused programs in {}: {error}",
                path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(base: &Path) -> Runtime {
        Runtime::prepare(base, None).unwrap()
    }

    #[test]
    fn programs_run_without_the_libraries_of_the_host() {
        let base = tempfile::tempdir().unwrap();
        let runtime = prepare(base.path());
        // The test program lists its tests when it is asked to: seen to run by its own loader.
        let argv = Runtime::argv(runtime.dir(), HELPER);
        let out = Command::new(&argv[0])
            .args(&argv[1..])
            .arg("--list")
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        assert!(String::from_utf8_lossy(&out.stdout).contains("programs_run_without"));
        let maps = Command::new(&argv[0])
            .args(&argv[1..4])
            .arg("--list")
            .arg(&argv[4])
            .output()
            .unwrap();
        for line in String::from_utf8_lossy(&maps.stdout).lines() {
            let ours = line.contains(&*runtime.dir().to_string_lossy());
            assert!(ours || line.contains("vdso"), "{line}");
        }
        assert!(runtime.dir().join("work").is_dir());
    }

    #[test]
    fn a_second_use_makes_nothing_anew() {
        let base = tempfile::tempdir().unwrap();
        let file = prepare(base.path()).dir().join("lib").join(LOADER);
        let first = fs::metadata(&file).unwrap().ino();
        prepare(base.path());
        assert_eq!(first, fs::metadata(&file).unwrap().ino());
        assert_eq!(
            1,
            fs::read_dir(base.path().join(".runtime")).unwrap().count()
        );
    }

    #[test]
    fn what_is_damaged_is_mended_and_what_others_added_stays() {
        let base = tempfile::tempdir().unwrap();
        let dir = prepare(base.path()).dir().to_path_buf();
        let loader = dir.join("lib").join(LOADER);
        let good = digest(&loader).unwrap();
        let other = dir.join("dmtcp/1234/file");
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        fs::write(&other, "theirs").unwrap();

        let mut bytes = fs::read(&loader).unwrap();
        bytes[1000] ^= 1;
        fs::remove_file(&loader).unwrap();
        fs::write(&loader, &bytes).unwrap();
        prepare(base.path());
        assert_eq!(good, digest(&loader).unwrap());

        fs::remove_file(&loader).unwrap();
        prepare(base.path());
        assert_eq!(good, digest(&loader).unwrap());

        fs::remove_file(dir.join(CLIENT)).unwrap();
        prepare(base.path());
        assert!(dir.join(CLIENT).is_file());

        fs::write(dir.join("contents.json"), "{").unwrap();
        fs::remove_dir(dir.join("work")).unwrap();
        prepare(base.path());
        assert!(damaged(&dir, &sources(None).unwrap()).is_empty());
        assert_eq!("theirs", fs::read_to_string(other).unwrap());
    }

    #[test]
    fn several_at_once_end_with_one_set() {
        let base = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| prepare(base.path()).dir))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(dirs.iter().all(|dir| *dir == dirs[0]));
        assert_eq!(
            1,
            fs::read_dir(base.path().join(".runtime")).unwrap().count()
        );
        assert!(damaged(&dirs[0], &sources(None).unwrap()).is_empty());
    }

    #[test]
    fn old_sets_go_and_young_ones_stay() {
        let base = tempfile::tempdir().unwrap();
        let home = base.path().join(".runtime");
        let age = |path: &Path, age: Duration| {
            File::open(path)
                .unwrap()
                .set_modified(SystemTime::now() - age)
                .unwrap();
        };
        for (name, days) in [("old", 200), ("young", 20)] {
            fs::create_dir_all(home.join(name)).unwrap();
            fs::write(home.join(name).join("used"), "").unwrap();
            age(
                &home.join(name).join("used"),
                Duration::from_secs(days * 86_400),
            );
            age(&home.join(name), Duration::from_secs(days * 86_400));
        }
        fs::create_dir_all(home.join(".making-x")).unwrap();
        age(&home.join(".making-x"), Duration::from_secs(2 * 86_400));
        prepare(base.path());
        assert!(!home.join("old").exists() && !home.join(".making-x").exists());
        assert!(home.join("young").exists());
    }

    #[test]
    fn other_programs_are_refused_with_the_reason() {
        let base = tempfile::tempdir().unwrap();
        let script = base.path().join("criu");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let error = Runtime::prepare(base.path(), Some(&script))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("criu") && error.contains("not a 64-bit ELF program"),
            "{error}"
        );
        let error = Runtime::prepare(&base.path().join("a:b"), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("choose another directory"), "{error}");
        let error = Runtime::prepare(&base.path().join("none"), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("none/.runtime"), "{error}");
    }
}
