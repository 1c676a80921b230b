//! Which stage of a script is which computation.
//!
//! Contract: a stage is known by what it is (its command line, working directory and the files that
//! its streams are), by the variables that the script has set for it, and by how many of the same
//! came before. So one of a loop, a pipeline or of several in the background finds its own state
//! in a later run, also when they start in another order. Keys are ordinals: the first stage that
//! a NAME ever had is `NAME/1`. Of several earlier stages that are what a new one is, the one is
//! taken whose variables differ least, then the oldest. Claims of one run are made by link(2), as
//! those of steps.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::store::{Cell, Result, StepKey, disk, escape};

/// In a stage's cell: its [`Identity`].
const FILE: &str = "stage.json";

/// Largest that is read back, in bytes: a command line may be long.
const CAP: u64 = 8 << 20;

/// Variables that say where and when something runs, not what.
const VOLATILE: &[&str] = &[
    "_",
    "SHLVL",
    "PWD",
    "OLDPWD",
    "HOSTNAME",
    "HOST",
    "TMPDIR",
    "PATH",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "BASHPID",
    "BASH_ENV",
];
const VOLATILE_PREFIXES: &[&str] = &["SLURM", "CONTAINER_CHECKPOINT", "XDG_", "BASH_FUNC_"];

/// What a stage is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Command line, working directory and files of the streams, as a hash.
    what: String,
    /// The command line, for people.
    command: Vec<String>,
    /// A hash for every variable.
    variables: BTreeMap<String, String>,
}

impl Identity {
    /// This process's, whose command line is `words`.
    pub fn of_this_process(words: &[OsString]) -> Identity {
        let directory = std::env::current_dir().unwrap_or_default();
        let files = [0, 1, 2].map(|stream| {
            // Pipes have another number in every run, and here-documents another name.
            std::fs::read_link(format!("/proc/self/fd/{stream}"))
                .ok()
                .filter(|path| path.is_absolute() && path.exists())
                .map(|path| path.into_os_string())
                .unwrap_or_default()
        });
        Identity::new(words, &directory, &files, std::env::vars_os())
    }

    fn new(
        words: &[OsString],
        directory: &Path,
        files: &[OsString],
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Identity {
        let mut hash = blake3::Hasher::new();
        let parts = words.iter().chain(files).map(OsString::as_os_str);
        for part in parts.chain([directory.as_os_str()]) {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let volatile = |name: &str| {
            VOLATILE.contains(&name) || VOLATILE_PREFIXES.iter().any(|p| name.starts_with(p))
        };
        Identity {
            what: short(&hash),
            command: words.iter().map(|word| escape(word)).collect(),
            variables: variables
                .map(|(name, value)| (name.to_string_lossy().into_owned(), value))
                .filter(|(name, _)| !volatile(name))
                .map(|(name, value)| {
                    let mut hash = blake3::Hasher::new();
                    hash.update(value.as_bytes());
                    (name, short(&hash))
                })
                .collect(),
        }
    }

    /// How many variables differ.
    fn differences(&self, other: &Identity) -> usize {
        let names = self.variables.keys().chain(other.variables.keys());
        let mut differing: Vec<&String> = names
            .filter(|name| self.variables.get(*name) != other.variables.get(*name))
            .collect();
        differing.sort();
        differing.dedup();
        differing.len()
    }
}

fn short(hash: &blake3::Hasher) -> String {
    hash.finalize().to_hex()[..16].to_owned()
}

/// The key of this stage of run `run` of `job`: that of an earlier run's, or a new one.
pub fn claim(name: &Cell, (job, run): (u32, u32), identity: &Identity) -> Result<StepKey> {
    let parent = name.dir().join("claims");
    let dir = parent.join(format!("{job}.{run}"));
    let steps = name.dir().join("steps");
    for dir in [name.dir(), &parent, &dir, &steps] {
        disk::private_dir(dir, false)?;
    }
    let mut last = 0;
    let mut earlier = Vec::new();
    for cell in name.steps()? {
        let Some(number) = cell.key().and_then(ordinal) else {
            continue;
        };
        last = last.max(number);
        if let Some(other) = read(&cell)?.filter(|other| other.what == identity.what) {
            earlier.push((identity.differences(&other), number));
        }
    }
    earlier.sort_unstable();
    let numbers = earlier.into_iter().map(|(_, number)| number);
    for number in numbers.chain(last + 1..) {
        let key = StepKey::parse(&number.to_string())?;
        if number > last && name.step(&key).exists() {
            continue;
        }
        if take(&dir, key.as_str())? {
            let cell = name.step(&key);
            disk::private_dir(cell.dir(), false)?;
            let text = serde_json::to_vec_pretty(identity).map_err(io::Error::from);
            let path = cell.dir().join(FILE);
            let text = text.map_err(|why| crate::store::Error::Damaged {
                path: path.clone(),
                why: why.to_string(),
            })?;
            disk::replace(&path, &text)?;
            return Ok(key);
        }
    }
    Err(crate::store::Error::Refused(format!(
        "{} has no place for another stage",
        name.label()
    )))
}

/// The ordinal that a key is, if it is a stage's.
pub fn ordinal(key: &StepKey) -> Option<u64> {
    key.as_str().parse().ok()
}

fn read(cell: &Cell) -> Result<Option<Identity>> {
    let path = cell.dir().join(FILE);
    let Some(text) = disk::read_if_there(&path, CAP)? else {
        return Ok(None);
    };
    // One that cannot be read belongs to nobody.
    Ok(serde_json::from_slice(&text)
        .inspect_err(|why| log::warn!("{}: {why}", path.display()))
        .ok())
}

/// Takes `key` for this stage; false if another one has it.
fn take(dir: &Path, key: &str) -> Result<bool> {
    let path = dir.join(key);
    let own = dir.join(disk::temporary_name(key.as_ref()));
    let made = disk::create(&own, std::process::id().to_string().as_bytes())
        .and_then(|()| std::fs::hard_link(&own, &path));
    disk::remove(&own)?;
    match made {
        Ok(()) => Ok(true),
        Err(why) if why.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(crate::store::Error::Io {
            doing: "create",
            path,
            error,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Name, Store};

    fn identity(words: &str, output: &str, variables: &[(&str, &str)]) -> Identity {
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        let variables = variables.iter().map(|(k, v)| (k.into(), v.into()));
        Identity::new(&words, Path::new("/d"), &[output.into()], variables)
    }

    fn cell(dir: &Path) -> Cell {
        let store = Store::open(&dir.join("store")).unwrap();
        store.name(&Name::parse("run").unwrap())
    }

    #[test]
    fn a_stage_finds_itself_again_whatever_the_order() {
        let dir = tempfile::tempdir().unwrap();
        let name = cell(dir.path());
        let claim =
            |run, identity: &Identity| claim(&name, (7, run), identity).unwrap().to_string();
        let one = identity("apptainer exec a.sif x", "", &[("SEED", "1"), ("T", "0")]);
        let two = identity("apptainer exec a.sif x", "", &[("SEED", "2"), ("T", "0")]);
        let other = identity("apptainer exec a.sif y", "", &[]);
        assert_eq!(claim(0, &one), "1");
        assert_eq!(claim(0, &two), "2");
        assert_eq!(claim(0, &one), "3", "the same once more");
        assert_eq!(claim(0, &other), "4");
        // Another order, and a variable that always changes.
        let later = |seed| identity("apptainer exec a.sif x", "", &[("SEED", seed), ("T", "9")]);
        assert_eq!(claim(1, &later("2")), "2");
        assert_eq!(claim(1, &other), "4");
        assert_eq!(claim(1, &later("1")), "1");
        assert_eq!(claim(1, &later("1")), "3");
        assert_eq!(claim(1, &identity("apptainer exec b.sif", "", &[])), "5");
        assert_ne!(
            identity("a", "/d/out.1", &[]).what,
            identity("a", "/d/out.2", &[]).what
        );
    }

    #[test]
    fn stages_that_start_together_get_different_keys() {
        let dir = tempfile::tempdir().unwrap();
        let name = cell(dir.path());
        let same = identity("apptainer exec a.sif x", "", &[]);
        let mut keys: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| claim(&name, (7, 0), &same).unwrap().to_string()))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<String>| thread.join().unwrap();
            threads.into_iter().map(join).collect()
        });
        keys.sort();
        assert_eq!(keys, ["1", "2", "3", "4", "5", "6", "7", "8"]);
    }

    #[test]
    fn places_and_times_do_not_count() {
        let here = identity("a", "", &[("HOSTNAME", "n1"), ("SLURM_JOB_NODELIST", "n1")]);
        let there = identity("a", "", &[("HOSTNAME", "n2"), ("X", "1")]);
        assert_eq!(here.differences(&there), 1);
    }
}
