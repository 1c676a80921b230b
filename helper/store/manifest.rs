//! The manifest of a generation: what it is, where it came from, and size and hash of every file.
//!
//! Contract: JSON that starts with exactly `{"format": 1, "check": "…"` (spaced as serde_json's
//! pretty printer does). `check` is the BLAKE3 of the whole file with the 64 digits of `check`
//! itself replaced by zeros: any flipped bit is found. [`Manifest::decode`] accepts what
//! [`Manifest::encode`] writes, ignores members that it does not know, and refuses everything that
//! is out of bounds. Documented for others in docs/on-disk-format.md.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Durations, Name, StepKey, Time, escape};
use crate::engine::{Kind, Placement};

/// The format that this program writes, and the only one so far.
pub const FORMAT: u32 = 1;
/// Largest manifest that is read, in bytes.
pub const CAP: u64 = 32 << 20;
/// Most files a generation may have.
pub const FILES_MAX: usize = 100_000;
/// Most ranks a generation may have.
pub const RANKS_MAX: u32 = 65_536;
/// Longest path of a file in a generation, in bytes, and its most components.
const PATH_MAX: usize = 4096;
const DEPTH_MAX: usize = 16;

pub const FILE_NAME: &str = "manifest.json";

const HEAD: &str = "{\n  \"format\": 1,\n  \"check\": \"";
const DIGITS: usize = 64;

/// Why a checkpoint was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    Preemption,
    TimeLimit,
    Interval,
    Signal,
    Request,
    ExitRequest,
    /// A node of the job is drained.
    Drain,
    /// Maintenance begins on a node of the job.
    Maintenance,
}

impl std::fmt::Display for Trigger {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.pad(match self {
            Trigger::Preemption => "preemption",
            Trigger::TimeLimit => "time-limit",
            Trigger::Interval => "interval",
            Trigger::Signal => "signal",
            Trigger::Request => "request",
            Trigger::ExitRequest => "exit-request",
            Trigger::Drain => "drain",
            Trigger::Maintenance => "maintenance",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The NAME under which it was saved (a clone gets its own).
    pub name: String,
    /// The key of an inner step's cell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_key: Option<String>,
    pub generation: u64,
    /// The generation from which the run was restarted, or that it saved before.
    pub predecessor: Option<u64>,
    pub created: Time,
    pub trigger: Trigger,
    /// Slurm's job; none outside of Slurm.
    pub job: Option<u32>,
    /// Slurm's step: a number, `batch` or `interactive`.
    pub step: String,
    /// Slurm's restart count, from 0.
    pub run: u32,
    pub host: String,
    pub ranks: u32,
    pub engine: Kind,
    pub engine_version: String,
    /// Where DMTCP came from; not there for other engines, and in manifests of the time when it was
    /// always injected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// The kernel release of the node, as `uname -r` prints it.
    pub kernel: String,
    /// What programs can see of the processor, sorted (see `fingerprint::cpu_flags`).
    pub cpu_flags: Vec<String>,
    pub image: Option<ImageRecord>,
    /// The application's command line, each word escaped as paths are.
    pub command: Vec<String>,
    pub durations: Durations,
    /// Files that the application had open for writing. The engine cuts them to this size at a
    /// restart (DMTCP), so that what was written after the checkpoint is not there twice.
    #[serde(default)]
    pub truncate: Vec<OpenFile>,
    /// Files of the node that it had open: without them it cannot go on. `size` is what they have to
    /// have at least.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<OpenFile>,
    /// The addresses with ports at which it listened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listens: Vec<std::net::SocketAddr>,
    /// How far the files were to which its output goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamEnd>,
    /// What the application has computed up to this state. None in generations of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub computed: Option<Computed>,
    /// The version of container-checkpoint that wrote it.
    pub version: String,
    /// Sum of the sizes of all files.
    pub bytes: u64,
    /// Every file of the generation but the manifest, sorted by path.
    pub files: Vec<FileRecord>,
}

/// A container image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Escaped.
    pub path: String,
    /// What `container::image::digest` says of it.
    pub digest: String,
}

/// A file that was open for writing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Absolute, as the application sees it; escaped.
    pub path: String,
    pub size: u64,
}

/// How far a file was to which a standard stream goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {
    /// 1 or 2; 1 for both if they go to one file.
    pub stream: i32,
    /// As this program sees it; escaped.
    pub path: String,
    pub size: u64,
    /// BLAKE3 of the last 4096 bytes before that, or of all there were.
    pub tail: String,
}

/// Work that is in a saved state, of all runs that led to it. Milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Computed {
    /// For how long the application ran.
    pub elapsed: u64,
    /// CPU time of rank 0's processes.
    pub cpu: u64,
}

/// A file of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Relative to the generation, starting with `rank-N/`; escaped.
    pub path: String,
    pub size: u64,
    /// 64 hexadecimal digits.
    pub blake3: String,
}

impl FileRecord {
    /// The path relative to the generation. Only ordinary components.
    pub fn relative(&self) -> Result<PathBuf, String> {
        relative(&self.path)
    }
}

/// A path in a generation, unescaped, if it can only lie below it.
fn relative(text: &str) -> Result<PathBuf, String> {
    let wrong = |why: &str| format!("the path {text:?} of a file {why}");
    let raw = escape::unescape(text).ok_or_else(|| wrong("is not escaped as it should be"))?;
    let path = PathBuf::from(&raw);
    let mut depth = 0;
    for component in path.components() {
        depth += 1;
        match component {
            Component::Normal(part)
                if part.len() <= 255 && !part.as_encoded_bytes().contains(&0) => {}
            _ => return Err(wrong("leads out of the generation or is no file name")),
        }
    }
    // `components` skips `./` and `//`: only the plain form is accepted.
    let plain: PathBuf = path.components().collect();
    if plain.as_os_str() != path.as_os_str()
        || raw.len() > PATH_MAX
        || !(2..=DEPTH_MAX).contains(&depth)
    {
        return Err(wrong("is not in its plain form `rank-N/…`"));
    }
    Ok(path)
}

/// The rank whose directory a path of a generation starts with.
fn rank_of(path: &Path) -> Option<u32> {
    let first = path.components().next()?.as_os_str().to_str()?;
    let number = first.strip_prefix("rank-")?;
    let rank: u32 = number.parse().ok()?;
    (rank.to_string() == number).then_some(rank)
}

#[derive(Serialize)]
struct Written<'a> {
    format: u32,
    check: &'a str,
    #[serde(flatten)]
    manifest: &'a Manifest,
}

impl Manifest {
    /// The bytes of manifest.json.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        self.validate()?;
        let zeros = "0".repeat(DIGITS);
        let written = Written {
            format: FORMAT,
            check: &zeros,
            manifest: self,
        };
        let mut bytes = serde_json::to_vec_pretty(&written).map_err(|e| e.to_string())?;
        bytes.push(b'\n');
        if bytes.len() as u64 > CAP {
            return Err(format!("the manifest would be larger than {CAP} bytes"));
        }
        let check = blake3::hash(&bytes).to_hex();
        bytes
            .get_mut(HEAD.len()..HEAD.len() + DIGITS)
            .ok_or("the manifest has no place for its check")?
            .copy_from_slice(check.as_bytes());
        Ok(bytes)
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, String> {
        if bytes.len() as u64 > CAP {
            return Err(format!("it is larger than {CAP} bytes"));
        }
        let head = HEAD.as_bytes();
        if !bytes.starts_with(head) {
            return Err(match other_format(bytes) {
                Some(format) => format!(
                    "it has format {format}, this program reads format {FORMAT}: use the \
                     container-checkpoint that wrote it, or a newer one"
                ),
                None if head.starts_with(bytes) => "it is cut short".into(),
                None => "it does not start as a manifest does".into(),
            });
        }
        let Some(check) = bytes.get(HEAD.len()..HEAD.len() + DIGITS) else {
            return Err("it is cut short".into());
        };
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(head)
            .update(&[b'0'; DIGITS])
            .update(&bytes[HEAD.len() + DIGITS..]);
        if hasher.finalize().to_hex().as_bytes() != check {
            return Err("its check does not fit its contents: it was changed or damaged".into());
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        manifest.validate()?;
        Ok(manifest)
    }

    fn validate(&self) -> Result<(), String> {
        Name::parse(&self.name).map_err(|e| e.to_string())?;
        if let Some(key) = &self.step_key {
            StepKey::parse(key).map_err(|e| e.to_string())?;
        }
        if self.generation == 0 || self.generation > super::generation::NUMBER_MAX {
            return Err(format!("{} is no number of a generation", self.generation));
        }
        if self.ranks == 0 || self.ranks > RANKS_MAX {
            return Err(format!("{} is no number of ranks", self.ranks));
        }
        if self.files.len() > FILES_MAX {
            return Err(format!("it has more than {FILES_MAX} files"));
        }
        let mut sum = 0u64;
        let mut seen = std::collections::HashSet::new();
        let mut last: Option<&str> = None;
        for file in &self.files {
            let path = file.relative()?;
            if last.is_some_and(|last| last >= file.path.as_str()) {
                return Err(format!(
                    "the file {:?} is out of order or there twice",
                    file.path
                ));
            }
            last = Some(&file.path);
            match rank_of(&path) {
                Some(rank) if rank < self.ranks => seen.insert(rank),
                _ => return Err(format!("the file {:?} is of no rank", file.path)),
            };
            if file.blake3.len() != DIGITS
                || !file
                    .blake3
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            {
                return Err(format!("the hash of {:?} is none", file.path));
            }
            sum = sum
                .checked_add(file.size)
                .ok_or("the sizes of its files overflow")?;
        }
        if seen.len() as u64 != u64::from(self.ranks) {
            return Err(format!(
                "only {} of {} ranks have files",
                seen.len(),
                self.ranks
            ));
        }
        if sum != self.bytes {
            return Err(format!(
                "its files have {sum} bytes, it says {}",
                self.bytes
            ));
        }
        Ok(())
    }
}

/// The format number of a manifest that is not ours.
fn other_format(bytes: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Format {
        format: u64,
    }
    let format = serde_json::from_slice::<Format>(bytes).ok()?.format;
    (format != u64::from(FORMAT)).then_some(format)
}

/// What is there to build a manifest from nothing, for tests of this and other modules.
#[cfg(test)]
pub fn sample() -> Manifest {
    let file = |path: &str, size| FileRecord {
        path: path.into(),
        size,
        blake3: blake3::hash(path.as_bytes()).to_hex().to_string(),
    };
    Manifest {
        name: "heat".into(),
        step_key: None,
        generation: 7,
        predecessor: Some(6),
        created: Time::from_millis(1_800_000_000_000),
        trigger: Trigger::Preemption,
        job: Some(42),
        step: "batch".into(),
        run: 1,
        host: "n1".into(),
        ranks: 2,
        engine: Kind::Dmtcp,
        engine_version: "4.1.1".into(),
        placement: None,
        kernel: "6.18.0".into(),
        cpu_flags: vec!["avx2".into(), "sse2".into()],
        image: Some(ImageRecord {
            path: "/home/alice/app.sif".into(),
            digest: "sif".into(),
        }),
        command: vec!["python3".into(), "heat.py".into()],
        durations: Durations::default(),
        truncate: vec![OpenFile {
            path: "/home/alice/out.txt".into(),
            size: 100,
        }],
        needs: vec![OpenFile {
            path: "/home/alice/in.dat".into(),
            size: 0,
        }],
        listens: vec![std::net::SocketAddr::from(([127, 0, 0, 1], 8888))],
        streams: vec![StreamEnd {
            stream: 1,
            path: "/home/alice/slurm-42.out".into(),
            size: 10,
            tail: blake3::hash(b"0123456789").to_hex().to_string(),
        }],
        computed: Some(Computed {
            elapsed: 60_000,
            cpu: 59_000,
        }),
        version: env!("CARGO_PKG_VERSION").into(),
        bytes: 30,
        files: vec![
            file("rank-0/ckpt_a.dmtcp", 10),
            file("rank-1/ckpt_b.dmtcp", 20),
        ],
    }
}
