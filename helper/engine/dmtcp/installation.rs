//! DMTCP as it is installed on this host, and how it comes into a container.
//!
//! Contract: [`find`] returns installations that are whole, or says which file is missing where;
//! nothing is left out in silence. [`Installation::stage`] copies one below the directory of
//! programs that is bound into containers:
//!
//! ```text
//! RUNTIME/dmtcp/4.1.1-5f0c…/      named by version and a hash over the files' paths, sizes, times
//!   bin/                          dmtcp_launch, dmtcp_restart, mtcp_restart…
//!   lib/dmtcp/                    libdmtcp.so and its plugins; lib64 leads here too
//!   extra/libatomic.so.1/         a directory for each library that an image may lack, so that an
//!     libatomic.so.1              image gets those it lacks and no others
//! ```
//!
//! DMTCP finds its libraries from where its programs are (`../lib/dmtcp`), so the tree works
//! anywhere.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::container::inspect::{self, Glibc};

/// Programs without which nothing works. The others of an installation come along.
const NEEDED: &[&str] = &[
    "dmtcp_launch",
    "dmtcp_restart",
    "dmtcp_coordinator",
    "mtcp_restart",
];

/// Libraries without which nothing works; `dmtcp_launch` preloads them by default.
const NEEDED_LIBS: &[&str] = &["libdmtcp.so", "libdmtcp_ipc.so", "libdmtcp_pid.so"];

/// Where an installation's libraries may be below its prefix.
const LIB_DIRS: &[&str] = &[
    "lib/dmtcp",
    "lib64/dmtcp",
    "lib/x86_64-linux-gnu/dmtcp",
    "lib/aarch64-linux-gnu/dmtcp",
];

/// Largest dmtcp-conf.yaml that is read, in bytes.
const CONF_MAX: u64 = 1 << 20;

/// Where to look for DMTCP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// Prefixes of installations, such as `/usr/local`. Several for container images with older and
    /// newer glibc.
    pub prefixes: Vec<PathBuf>,
    /// Apptainer's `dmtcp-conf.yaml`, which lists `bins` and `libs` by name or absolute path.
    pub apptainer_conf: Option<PathBuf>,
}

impl Search {
    /// Of `prefixes` those that are there: they need not all be on every node.
    pub fn here(prefixes: &[PathBuf], apptainer_conf: Option<&Path>) -> Search {
        let here = |prefix: &&PathBuf| prefix.join("bin/dmtcp_launch").exists();
        Search {
            prefixes: prefixes.iter().filter(here).cloned().collect(),
            apptainer_conf: apptainer_conf.map(Path::to_path_buf),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error(
        "DMTCP is not installed: no dmtcp_launch in PATH; install DMTCP 4 or name its prefix in \
         the configuration"
    )]
    NotInstalled,
    #[error("DMTCP in {prefix} is not whole: {missing} not found")]
    Lacks { prefix: PathBuf, missing: String },
    #[error("{conf} lists {missing}, not found on this host")]
    Listed { conf: PathBuf, missing: String },
    #[error("DMTCP {version} in {prefix} is not supported; versions 4.0 to 4.2 are")]
    Version { prefix: PathBuf, version: String },
    #[error("cannot learn DMTCP's version from {program}: {said}")]
    NoVersion { program: PathBuf, said: String },
    #[error("cannot {what} {path}: {source}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot understand {path}: {why}")]
    Conf { path: PathBuf, why: String },
}

/// One whole installation.
#[derive(Debug, Clone)]
pub struct Installation {
    /// As `dmtcp_launch --version` says, e.g. `4.1.1`.
    pub version: String,
    /// The newest glibc that a file of it needs.
    pub glibc: Glibc,
    /// Where it is, for messages, and for use on the bare host if it is in one place.
    pub prefix: PathBuf,
    /// Whether `prefix` has the layout that DMTCP needs.
    in_place: bool,
    /// Files by where they go below the staged directory.
    files: BTreeMap<String, PathBuf>,
    /// Libraries of the host, not of its glibc, that it needs: name and file.
    extra: BTreeMap<String, PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Conf {
    #[serde(default)]
    bins: Vec<PathBuf>,
    #[serde(default)]
    libs: Vec<PathBuf>,
}

/// Finds the installations that `search` names, else the one whose `dmtcp_launch` is in PATH. Not
/// empty.
pub fn find(search: &Search) -> Result<Vec<Installation>, InstallError> {
    let mut found = Vec::new();
    for prefix in &search.prefixes {
        found.push(at_prefix(prefix)?);
    }
    if let Some(conf) = &search.apptainer_conf {
        found.push(listed(conf)?);
    }
    if found.is_empty() {
        let launch = in_path("dmtcp_launch").ok_or(InstallError::NotInstalled)?;
        let launch = fs::canonicalize(&launch).map_err(io_error("resolve", &launch))?;
        let prefix = launch.parent().and_then(Path::parent);
        found.push(at_prefix(prefix.unwrap_or(Path::new("/")))?);
    }
    Ok(found)
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_path_buf();
    move |source| InstallError::Io { what, path, source }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn at_prefix(prefix: &Path) -> Result<Installation, InstallError> {
    let lacks = |missing: String| InstallError::Lacks {
        prefix: prefix.into(),
        missing,
    };
    let bin = prefix.join("bin");
    let mut files = BTreeMap::new();
    for (name, path) in entries(&bin)? {
        if name.starts_with("dmtcp_") || name == "mtcp_restart" {
            files.insert(format!("bin/{name}"), path);
        }
    }
    let lib = LIB_DIRS
        .iter()
        .map(|dir| prefix.join(dir))
        .find(|dir| dir.join(NEEDED_LIBS[0]).is_file())
        .ok_or_else(|| lacks("lib/dmtcp/libdmtcp.so".to_owned()))?;
    for (name, path) in entries(&lib)? {
        if name.ends_with(".so") {
            files.insert(format!("lib/dmtcp/{name}"), path);
        }
    }
    if let Some(missing) = missing(&files) {
        return Err(lacks(missing));
    }
    let in_place = lib.ends_with("lib/dmtcp") || lib.ends_with("lib64/dmtcp");
    examine(prefix, in_place, files)
}

/// The installation whose files Apptainer's configuration lists.
fn listed(path: &Path) -> Result<Installation, InstallError> {
    let size = fs::metadata(path).map_err(io_error("read", path))?.len();
    if size > CONF_MAX {
        return Err(InstallError::Conf {
            path: path.into(),
            why: format!("it is larger than {CONF_MAX} bytes"),
        });
    }
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    let conf: Conf = serde_saphyr::from_str(&text).map_err(|error| InstallError::Conf {
        path: path.into(),
        why: error.to_string(),
    })?;
    let mut files = BTreeMap::new();
    let mut absent = Vec::new();
    for bin in &conf.bins {
        let name = bin.file_name().unwrap_or_default().to_string_lossy();
        let found = match bin.is_absolute() {
            true => bin.is_file().then(|| bin.clone()),
            false => in_path(&name),
        };
        match found {
            Some(found) => drop(files.insert(format!("bin/{name}"), found)),
            None => absent.push(name.into_owned()),
        }
    }
    // A bare library is looked for beside the programs and where the host's loader looks.
    let beside = files
        .get("bin/dmtcp_launch")
        .and_then(|launch| launch.parent()?.parent().map(Path::to_path_buf));
    let dirs: Vec<PathBuf> = beside
        .iter()
        .flat_map(|prefix| LIB_DIRS.iter().map(|dir| prefix.join(dir)))
        .chain(["/usr/lib", "/usr/lib64", "/lib"].map(PathBuf::from))
        .collect();
    for lib in &conf.libs {
        let name = lib.file_name().unwrap_or_default().to_string_lossy();
        let found = match lib.is_absolute() {
            true => lib.is_file().then(|| lib.clone()),
            false => dirs.iter().map(|dir| dir.join(lib)).find(|f| f.is_file()),
        };
        match found {
            Some(found) => drop(files.insert(format!("lib/dmtcp/{name}"), found)),
            None => absent.push(name.into_owned()),
        }
    }
    // Apptainer's own list names files that DMTCP dropped long ago: what is needed counts.
    if let Some(missing) = missing(&files) {
        return Err(InstallError::Listed {
            conf: path.into(),
            missing,
        });
    }
    if !absent.is_empty() {
        log::info!(
            "{}: not on this host: {}",
            path.display(),
            absent.join(", ")
        );
    }
    examine(path, false, files)
}

/// The files in `dir` with their names, links followed.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, InstallError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        if entry.path().is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// The names of needed files that are not among `files`.
fn missing(files: &BTreeMap<String, PathBuf>) -> Option<String> {
    let needed = NEEDED.iter().map(|name| format!("bin/{name}"));
    let needed = needed.chain(NEEDED_LIBS.iter().map(|name| format!("lib/dmtcp/{name}")));
    let missing: Vec<String> = needed.filter(|name| !files.contains_key(name)).collect();
    (!missing.is_empty()).then(|| missing.join(", "))
}

/// Learns version, glibc and libraries of an installation whose files are there.
fn examine(
    prefix: &Path,
    in_place: bool,
    files: BTreeMap<String, PathBuf>,
) -> Result<Installation, InstallError> {
    let launch = &files["bin/dmtcp_launch"];
    let version = version(launch)?;
    if !supported(&version) {
        return Err(InstallError::Version {
            prefix: prefix.into(),
            version,
        });
    }
    let glibc = files
        .values()
        .filter_map(|file| inspect::glibc_of(file))
        .max();
    let mut extra = BTreeMap::new();
    for name in NEEDED.iter().map(|name| format!("bin/{name}")) {
        extra.append(&mut inspect::libraries_of(&files[&name]));
    }
    extra.append(&mut inspect::libraries_of(launch));
    extra.retain(|name, _| !is_of_glibc(name) && !files.contains_key(&format!("lib/dmtcp/{name}")));
    Ok(Installation {
        version,
        glibc: glibc.unwrap_or((2, 0)),
        prefix: prefix.into(),
        in_place,
        files,
        extra,
    })
}

/// Whether an image brings this library with its own glibc, so that another's would break it.
fn is_of_glibc(library: &str) -> bool {
    [
        "libc.so",
        "libm.so",
        "libdl.so",
        "librt.so",
        "libpthread.so",
        "libresolv.so",
        "ld-linux",
        "linux-vdso",
        "libmvec.so",
        "libutil.so",
    ]
    .iter()
    .any(|own| library.starts_with(own))
}

fn version(launch: &Path) -> Result<String, InstallError> {
    inspect::dmtcp_version(launch).map_err(|said| InstallError::NoVersion {
        program: launch.into(),
        said,
    })
}

/// Whether this program knows how to deal with this version of DMTCP.
pub fn supported(version: &str) -> bool {
    ["4.0", "4.1", "4.2"]
        .iter()
        .any(|known| version == *known || version.starts_with(&format!("{known}.")))
}

impl Installation {
    /// The coordinator, which runs on the host.
    pub fn coordinator(&self) -> &Path {
        &self.files["bin/dmtcp_coordinator"]
    }

    /// The directory of the installation's programs on the host, if DMTCP can run from where it is.
    pub fn bin_in_place(&self) -> Option<PathBuf> {
        self.in_place.then(|| self.prefix.join("bin"))
    }

    /// Names of libraries that come along with the staged tree.
    pub fn brings(&self, library: &str) -> bool {
        self.extra.contains_key(library)
    }

    /// The glibc that a library which comes along needs; `None` if it needs none in particular.
    pub fn needs_of(&self, library: &str) -> Option<Glibc> {
        inspect::glibc_of(self.extra.get(library)?)
    }

    /// The name of the staged directory, e.g. `dmtcp/4.1.1-5f0c1a2b3c4d`.
    fn key(&self) -> Result<String, InstallError> {
        let mut hash = blake3::Hasher::new();
        for (name, file) in self.files.iter().chain(&self.extra) {
            let meta = fs::metadata(file).map_err(io_error("examine", file))?;
            hash.update(
                format!(
                    "{name}\0{}\0{}\0{}.{}\n",
                    file.display(),
                    meta.len(),
                    meta.mtime(),
                    meta.mtime_nsec()
                )
                .as_bytes(),
            );
        }
        let hash = hash.finalize().to_hex();
        Ok(format!("dmtcp/{}-{}", self.version, &hash[..12]))
    }

    /// Copies the installation below `runtime` unless it is there; returns its path below that.
    /// May be done by several helpers at once.
    pub fn stage(&self, runtime: &Path) -> Result<PathBuf, InstallError> {
        let key = self.key()?;
        let target = runtime.join(&key);
        let plan: Vec<(String, &PathBuf)> = self
            .files
            .iter()
            .map(|(name, file)| (name.clone(), file))
            .chain(
                self.extra
                    .iter()
                    .map(|(name, file)| (format!("extra/{name}/{name}"), file)),
            )
            .collect();
        if plan
            .iter()
            .all(|(name, file)| same_size(&target.join(name), file))
        {
            return Ok(key.into());
        }
        let home = runtime.join("dmtcp");
        make_dirs(&home)?;
        let making = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(&home)
            .map_err(io_error("make a directory in", &home))?;
        for (name, file) in &plan {
            let to = making.path().join(name);
            make_dirs(to.parent().unwrap_or(&to))?;
            fs::copy(file, &to).map_err(io_error("copy", file))?;
        }
        let lib64 = making.path().join("lib64");
        std::os::unix::fs::symlink("lib", &lib64).map_err(io_error("make", &lib64))?;
        if let Err(first) = fs::rename(making.path(), &target) {
            // Another helper was faster, or what is there is damaged: then it makes way.
            if plan
                .iter()
                .all(|(name, file)| same_size(&target.join(name), file))
            {
                return Ok(key.into());
            }
            if !target.exists() {
                return Err(io_error("make", &target)(first));
            }
            let aside = tempfile::Builder::new()
                .prefix(".making-")
                .tempdir_in(&home)
                .map_err(io_error("make a directory in", &home))?;
            fs::rename(&target, aside.path().join("old"))
                .and_then(|()| fs::rename(making.path(), &target))
                .map_err(io_error("replace", &target))?;
        }
        // It has its final name: nothing is left to be removed.
        let _ = making.keep();
        Ok(key.into())
    }

    /// The value by which `LD_LIBRARY_PATH` grows where the libraries `missing` are lacking, for a
    /// staged tree that is seen at `staged`.
    pub fn library_path(&self, staged: &Path, missing: &[String]) -> Option<OsString> {
        let dirs: Vec<PathBuf> = missing
            .iter()
            .filter(|name| self.brings(name))
            .map(|name| staged.join("extra").join(name))
            .collect();
        match dirs.is_empty() {
            true => None,
            false => std::env::join_paths(dirs).ok(),
        }
    }
}

fn same_size(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => a.len() == b.len(),
        _ => false,
    }
}

fn make_dirs(dir: &Path) -> Result<(), InstallError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_error("make the directory", dir))
}
