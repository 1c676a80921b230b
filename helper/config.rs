//! The configuration file: what an admin decides for a site.
//!
//! Contract: [`Config::load`] reads one YAML file, checks every value there and then, and returns
//! settings that need no further check. A file that has an unknown key, a value out of range or a
//! key twice is refused with its name, line and column; nothing of it is used. No file means the
//! defaults. `slurm/container-checkpoint.yaml` documents every key for people.
//!
//! The helper runs as the user, so this file decides nothing that a user must not decide.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Deserializer, de};

use crate::words;

/// Where the configuration is looked for when nobody names a file.
pub const DEFAULT_PATH: &str = "/etc/slurm/container-checkpoint.yaml";

/// A configuration is some kilobytes; more than this is a mistake.
const LARGEST_FILE: u64 = 1 << 20;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration file {}: {error}", path.display())]
    Read {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("the configuration file {} is larger than {LARGEST_FILE} bytes", path.display())]
    TooLarge { path: PathBuf },
    /// `at` is `line L, column C`.
    #[error("configuration file {}, {at}: {message}", path.display())]
    Value {
        path: PathBuf,
        at: String,
        message: String,
    },
}

/// A site's settings. Each field is a key of the file and is described there.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Pattern of the store's path; [`Config::store`] expands it.
    #[serde(deserialize_with = "store_pattern")]
    pub dir: String,
    #[serde(deserialize_with = "text")]
    pub engine: EngineChoice,
    #[serde(deserialize_with = "text")]
    pub placement: PlacementChoice,
    /// Prefixes of DMTCP installations; they need not be on every node.
    #[serde(deserialize_with = "absolute_list")]
    pub dmtcp: Vec<PathBuf>,
    /// Apptainer's dmtcp-conf.yaml, whose installation counts as well.
    #[serde(deserialize_with = "absolute")]
    pub dmtcp_conf: Option<PathBuf>,
    /// The program; `None`: the first `criu` in PATH, then the sbin directories.
    #[serde(deserialize_with = "absolute")]
    pub criu: Option<PathBuf>,
    /// The program; `None`: the first of `apptainer` and `singularity` in PATH.
    #[serde(deserialize_with = "absolute")]
    pub apptainer: Option<PathBuf>,
    /// Options of `apptainer exec` for every container.
    pub apptainer_options: Vec<String>,
    /// Generations that are kept for each name, 1 to 1000.
    #[serde(deserialize_with = "from_1")]
    pub keep: u32,
    #[serde(deserialize_with = "text")]
    pub on_time_limit: OnTimeLimit,
    #[serde(deserialize_with = "text")]
    pub on_cancel: OnCancel,
    #[serde(deserialize_with = "text")]
    pub completed_stages: CompletedStages,
    #[serde(deserialize_with = "text")]
    pub on_drain: OnEmptying,
    #[serde(deserialize_with = "text")]
    pub on_maintenance: OnEmptying,
    #[serde(deserialize_with = "text")]
    pub on_no_generation: OnNoGeneration,
    #[serde(deserialize_with = "text")]
    pub on_unavailable: OnUnavailable,
    #[serde(deserialize_with = "text")]
    pub output: OutputMode,
    #[serde(deserialize_with = "text")]
    pub preflight: Preflight,
    /// `None`: nobody chose, which is `off`.
    #[serde(deserialize_with = "optional_text")]
    pub interval: Option<Interval>,
    /// Mean time between losses that nobody announces (crash of a node), 1 minute to 10 years.
    #[serde(deserialize_with = "mtbf")]
    pub mtbf: Duration,
    /// The signal that requests a checkpoint; never one that [`request_signal`] refuses.
    #[serde(deserialize_with = "optional_signal")]
    pub signal: Option<Signal>,
    /// `None`: predicted from memory and throughput. 1 second to 1 day.
    #[serde(deserialize_with = "lead_time")]
    pub lead_time: Option<Duration>,
    /// Factor on a predicted duration, 1 to 10.
    #[serde(deserialize_with = "safety")]
    pub safety: f64,
    /// Longest duration of a checkpoint, 1 second to 1 day.
    #[serde(deserialize_with = "a_day")]
    pub checkpoint_timeout: Duration,
    /// Longest duration of a restart until the application runs, 1 second to 1 day.
    #[serde(deserialize_with = "a_day")]
    pub restart_timeout: Duration,
    /// How long a run waits for the previous run of the same job that still writes, 0 to 1 day.
    #[serde(deserialize_with = "lock_wait")]
    pub lock_wait: Duration,
    /// Longest time for which an application may hold checkpoints off, 0 (never) to 1 hour.
    #[serde(deserialize_with = "hold_limit")]
    pub hold_limit: Duration,
    /// How often Slurm is asked about a job that runs, 5 seconds to 1 hour.
    #[serde(deserialize_with = "query_interval")]
    pub query_interval: Duration,
    /// Restarts within one run after an engine lost the application, 0 to 1000.
    #[serde(deserialize_with = "from_0")]
    pub restarts_within_run: u32,
    /// Runs of a job in a row that come to nothing until it is held, 0 (never) to 1000.
    #[serde(deserialize_with = "from_0")]
    pub progress_runs: u32,
    /// Whether the job's comment tells of its newest checkpoint.
    #[serde(deserialize_with = "switch")]
    pub comment: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            dir: "%h/.container-checkpoint".into(),
            engine: EngineChoice::Auto,
            placement: PlacementChoice::Auto,
            dmtcp: ["/usr/local", "/usr", "/opt/dmtcp"]
                .map(PathBuf::from)
                .into(),
            dmtcp_conf: None,
            criu: None,
            apptainer: None,
            apptainer_options: Vec::new(),
            keep: 2,
            on_time_limit: OnTimeLimit::Requeue,
            on_cancel: OnCancel::Save,
            completed_stages: CompletedStages::Skip,
            on_drain: OnEmptying::Ignore,
            on_maintenance: OnEmptying::Save,
            on_no_generation: OnNoGeneration::Fail,
            on_unavailable: OnUnavailable::Fail,
            output: OutputMode::Exact,
            preflight: Preflight::Warn,
            interval: None,
            mtbf: DAY,
            signal: None,
            lead_time: None,
            safety: 1.5,
            checkpoint_timeout: 10 * MINUTE,
            restart_timeout: 5 * MINUTE,
            lock_wait: 2 * MINUTE,
            hold_limit: MINUTE,
            query_interval: MINUTE,
            restarts_within_run: 2,
            progress_runs: 3,
            comment: false,
        }
    }
}

impl Config {
    /// Reads the configuration: `path` (from `--config`), else the file that
    /// `CONTAINER_CHECKPOINT_CONFIG` names, else [`DEFAULT_PATH`]. Only the last may be missing.
    pub fn load(path: Option<&Path>) -> Result<Config, Error> {
        let named = path.map(Path::to_path_buf).or_else(|| {
            std::env::var_os(words::variable::CONFIG)
                .filter(|p| !p.is_empty())
                .map(PathBuf::from)
        });
        match named {
            Some(path) => Config::read(&path),
            None => match Config::read(Path::new(DEFAULT_PATH)) {
                Err(Error::Read { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
                    Ok(Config::default())
                }
                other => other,
            },
        }
    }

    fn read(path: &Path) -> Result<Config, Error> {
        parse(path, &read_text(path)?)
    }

    /// The store's directory for a user.
    pub fn store(&self, home: &Path, user: &str) -> PathBuf {
        expand_store(&self.dir, home, user)
    }
}

/// Replaces `%h` by the home directory and `%u` by the user in a store pattern, which has passed
/// [`check_store_pattern`].
pub fn expand_store(pattern: &str, home: &Path, user: &str) -> PathBuf {
    let mut path = OsString::new();
    for (number, part) in pattern.split("%h").enumerate() {
        if number > 0 {
            path.push(home);
        }
        path.push(part.replace("%u", user));
    }
    PathBuf::from(path)
}

/// Checks the pattern of a store: an absolute path, in which `%h` and `%u` may stand.
pub fn check_store_pattern(pattern: &str) -> Result<(), String> {
    let mut rest = pattern;
    while let Some(at) = rest.find('%') {
        if !matches!(rest.as_bytes().get(at + 1), Some(b'h' | b'u')) {
            return Err(format!(
                "`{pattern}`: only %h (home directory) and %u (user) may follow a %"
            ));
        }
        rest = &rest[at + 2..];
    }
    if pattern.starts_with('/') || pattern.starts_with("%h") {
        return Ok(());
    }
    Err(format!(
        "`{pattern}` is no absolute path (it may begin with %h, the home directory)"
    ))
}

/// Reads a duration: `30s`, `10m`, `2h`, `1d`, `1h30m`; as Slurm writes it `M:S`, `H:M:S`, `D-H`,
/// `D-H:M`, `D-H:M:S`; or plain seconds (which Slurm would take for minutes).
pub fn duration(text: &str) -> Result<Duration, String> {
    let refuse = || {
        format!("`{text}` is no duration such as 90, 30s, 10m, 2h, 1h30m, 12:00:00 or 1-12:00:00")
    };
    let number = |digits: &str| -> Option<u64> {
        let fits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        fits.then(|| digits.parse().ok()).flatten()
    };
    let seconds = if text.contains([':', '-']) {
        slurm_seconds(text, number)
    } else {
        number(text).or_else(|| unit_seconds(text, number))
    };
    seconds.map(Duration::from_secs).ok_or_else(refuse)
}

/// `D-H[:M[:S]]`, `H:M:S` or `M:S`.
fn slurm_seconds(text: &str, number: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let fields: Vec<u64> = clock.split(':').map(number).collect::<Option<_>>()?;
    let (hours, minutes, seconds) = match (days.is_some(), fields.as_slice()) {
        (true, [h]) => (*h, 0, 0),
        (true, [h, m]) => (*h, *m, 0),
        (false, [m, s]) => (0, *m, *s),
        (_, [h, m, s]) => (*h, *m, *s),
        _ => return None,
    };
    let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    minutes.checked_mul(60)?.checked_add(seconds)
}

/// One or more numbers, each with its unit, the larger units first: `1h30m`.
fn unit_seconds(text: &str, number: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let mut total = 0u64;
    let mut last = u64::MAX;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let at = rest.find(|c: char| !c.is_ascii_digit())?;
        let unit = match rest.as_bytes().get(at)? {
            b's' => 1,
            b'm' => 60,
            b'h' => 3600,
            b'd' => 86_400,
            _ => return None,
        };
        if unit >= last {
            return None;
        }
        last = unit;
        total = total.checked_add(number(&rest[..at])?.checked_mul(unit)?)?;
        rest = &rest[at + 1..];
    }
    Some(total)
}

/// Reads the name of the signal that requests a checkpoint, with or without `SIG`. Refuses those
/// that mean something else here.
pub fn request_signal(text: &str) -> Result<Signal, String> {
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") {
        upper
    } else {
        format!("SIG{upper}")
    };
    let signal = Signal::from_str(&name)
        .map_err(|_| format!("`{text}` is no name of a signal, such as USR1 or SIGUSR1"))?;
    let taken = match signal {
        Signal::SIGKILL | Signal::SIGSTOP => "it cannot be caught",
        Signal::SIGTERM | Signal::SIGCONT | Signal::SIGTSTP => "Slurm uses it to end or stop jobs",
        Signal::SIGUSR2 => "DMTCP keeps it for itself",
        Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGTTIN | Signal::SIGTTOU => {
            "the kernel sends it for other reasons"
        }
        Signal::SIGSEGV
        | Signal::SIGBUS
        | Signal::SIGFPE
        | Signal::SIGILL
        | Signal::SIGTRAP
        | Signal::SIGABRT
        | Signal::SIGSYS => "it tells of a crash",
        _ => return Ok(signal),
    };
    Err(format!(
        "{name} cannot request a checkpoint: {taken}; choose for example USR1"
    ))
}

/// A choice between words: the enumeration, what each word means, and how it is read.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$about])* $variant,)+ }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($name::$variant),)+
                    _ => Err(one_of(text, &[$($word),+])),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(match self { $($name::$variant => $word,)+ })
            }
        }
    };
}

fn one_of(text: &str, words: &[&str]) -> String {
    format!("`{text}` is none of {}", words.join(", "))
}

words! {
    /// Which engine is taken.
    EngineChoice {
        /// DMTCP where it is installed and can hold the application, else CRIU.
        Auto = "auto",
        Dmtcp = "dmtcp",
        Criu = "criu",
    }
}

words! {
    /// Where DMTCP comes from.
    PlacementChoice {
        /// The container image, if it has its own, else this node.
        Auto = "auto",
        /// This node.
        Injected = "injected",
        /// The container image.
        Contained = "contained",
    }
}

words! {
    /// What becomes of a job at its time limit, once it is saved.
    OnTimeLimit {
        /// It is requeued and goes on.
        Requeue = "requeue",
        /// It ends; the user submits it again.
        Exit = "exit",
    }
}

words! {
    /// What becomes of the application's state when its job is cancelled.
    OnCancel {
        /// It is saved, as on any other end.
        Save = "save",
        /// Nothing more is saved; earlier generations stay.
        Discard = "discard",
    }
}

words! {
    /// What a requeued job does with those steps and containers of its script that have completed.
    CompletedStages {
        /// They give back how they ended, and what they wrote.
        Skip = "skip",
        Rerun = "rerun",
    }
}

words! {
    /// What a job does when one of its nodes is to be empty.
    OnEmptying {
        /// It stays, as any other job.
        Ignore = "ignore",
        /// It is saved, requeued and goes on elsewhere.
        Save = "save",
    }
}

words! {
    /// What happens when there were generations and none of them is good.
    OnNoGeneration {
        Fail = "fail",
        /// The application starts from its beginning.
        Fresh = "fresh",
    }
}

words! {
    /// What happens when the application cannot be protected at all.
    OnUnavailable {
        Fail = "fail",
        /// It runs unprotected, with a warning.
        Run = "run",
    }
}

words! {
    /// What happens when something is known that checkpoints will probably not survive.
    Preflight {
        Off = "off",
        /// It runs, with a warning.
        Warn = "warn",
        Fail = "fail",
    }
}

words! {
    /// What becomes of output that was written after the checkpoint a run goes on from.
    OutputMode {
        /// It is cut off, since it is written again.
        Exact = "exact",
        /// It stays.
        Append = "append",
    }
}

/// When checkpoints are taken without any other reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interval {
    Off,
    /// The optimum for the measured cost of a checkpoint and `mtbf`.
    Auto,
    /// 1 second to 30 days.
    Every(Duration),
}

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Interval::Off),
            "auto" => Ok(Interval::Auto),
            _ => duration(text)
                .map_err(|e| format!("{}, and neither off nor auto", e))
                .and_then(|d| within(d, SECOND..=30 * DAY, text))
                .map(Interval::Every),
        }
    }
}

fn within<T: PartialOrd + fmt::Debug>(
    value: T,
    range: RangeInclusive<T>,
    text: &str,
) -> Result<T, String> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(format!(
        "{text} is outside of {:?} to {:?}",
        range.start(),
        range.end()
    ))
}

// Readers of single values. All take the scalar's text: YAML's own ideas of types (`on` as a
// boolean, 1:30 as a number to base 60) would only get in the way.

fn text<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(from: D) -> Result<T, D::Error> {
    String::deserialize(from)?
        .parse()
        .map_err(de::Error::custom)
}

fn optional_text<'de, D, T>(from: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    let text = Option::<String>::deserialize(from)?;
    text.map(|t| t.parse())
        .transpose()
        .map_err(de::Error::custom)
}

fn optional_signal<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Signal>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|t| request_signal(&t))
        .transpose()
        .map_err(de::Error::custom)
}

fn store_pattern<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let pattern = String::deserialize(from)?;
    check_store_pattern(&pattern).map_err(de::Error::custom)?;
    Ok(pattern)
}

fn absolute_path(text: String) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        return Ok(PathBuf::from(text));
    }
    Err(format!("`{text}` is no absolute path"))
}

fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(absolute_path)
        .transpose()
        .map_err(de::Error::custom)
}

fn absolute_list<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    let list = Vec::<String>::deserialize(from)?;
    list.into_iter()
        .map(absolute_path)
        .collect::<Result<_, _>>()
        .map_err(de::Error::custom)
}

fn duration_within<'de, D: Deserializer<'de>>(
    from: D,
    range: RangeInclusive<Duration>,
) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    duration(&text)
        .and_then(|d| within(d, range, &text))
        .map_err(de::Error::custom)
}

fn a_day<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration_within(from, SECOND..=DAY)
}

fn lock_wait<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration_within(from, Duration::ZERO..=DAY)
}

fn hold_limit<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration_within(from, Duration::ZERO..=HOUR)
}

fn query_interval<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration_within(from, 5 * SECOND..=HOUR)
}

fn mtbf<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    duration_within(from, MINUTE..=3650 * DAY)
}

fn lead_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let Some(text) = Option::<String>::deserialize(from)? else {
        return Ok(None);
    };
    let lead = duration(&text).and_then(|d| within(d, SECOND..=24 * HOUR, &text));
    lead.map(Some).map_err(de::Error::custom)
}

fn number<'de, D, T>(from: D, kind: &str, range: RangeInclusive<T>) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr + PartialOrd + fmt::Debug,
{
    let text = String::deserialize(from)?;
    let value = text
        .parse()
        .map_err(|_| de::Error::custom(format!("`{text}` is no {kind}")))?;
    within(value, range, &text).map_err(de::Error::custom)
}

fn from_1<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number(from, "whole number", 1..=1000)
}

fn from_0<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    number(from, "whole number", 0..=1000)
}

fn switch<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    match String::deserialize(from)?.as_str() {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(de::Error::custom(one_of(other, &["on", "off"]))),
    }
}

fn safety<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    number(from, "number", 1.0..=10.0)
}

fn read_text(path: &Path) -> Result<String, Error> {
    let unread = |error| Error::Read {
        path: path.into(),
        error,
    };
    let file = std::fs::File::open(path).map_err(unread)?;
    let mut text = String::new();
    file.take(LARGEST_FILE + 1)
        .read_to_string(&mut text)
        .map_err(unread)?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(Error::TooLarge { path: path.into() });
    }
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Config, Error> {
    let options = serde_saphyr::options! { with_snippet: false };
    let parsed: Result<Option<Config>, _> = serde_saphyr::from_str_with_options(text, options);
    // A file of nothing but comments is an empty document.
    parsed.map(Option::unwrap_or_default).map_err(|error| {
        let at = error.location().map_or_else(
            || "no line known".to_string(),
            |l| format!("line {}, column {}", l.line(), l.column()),
        );
        let message = error.without_snippet().to_string();
        let message = message
            .strip_suffix(&format!(" at {at}"))
            .unwrap_or(&message)
            .to_string();
        Error::Value {
            path: path.into(),
            at,
            message,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::forward_to_deserialize_any;

    const SHIPPED: &str = include_str!("../slurm/container-checkpoint.yaml");

    fn read(text: &str) -> Result<Config, Error> {
        parse(Path::new("/etc/x.yaml"), text)
    }

    fn refusal(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    /// The keys of [`Config`], as serde's derive names them.
    fn keys() -> &'static [&'static str] {
        struct Catch(Option<&'static [&'static str]>);
        impl<'de> Deserializer<'de> for &mut Catch {
            type Error = de::value::Error;
            fn deserialize_struct<V: de::Visitor<'de>>(
                self,
                _: &'static str,
                fields: &'static [&'static str],
                _: V,
            ) -> Result<V::Value, Self::Error> {
                self.0 = Some(fields);
                Err(de::Error::custom("caught"))
            }
            fn deserialize_any<V: de::Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
                Err(de::Error::custom("no struct"))
            }
            forward_to_deserialize_any! {
                bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option
                unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
                ignored_any
            }
        }
        let mut catch = Catch(None);
        assert!(Config::deserialize(&mut catch).is_err());
        catch.0.unwrap()
    }

    /// Lines `#key: value` without the `#`; prose has a blank after it.
    fn uncommented() -> String {
        let keep = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && *line != "#";
        SHIPPED
            .lines()
            .filter(keep)
            .map(|l| format!("{}\n", &l[1..]))
            .collect()
    }

    #[test]
    fn shipped_file_changes_nothing() {
        assert_eq!(read(SHIPPED).unwrap(), Config::default());
        assert!(
            SHIPPED.lines().all(|l| l.is_empty() || l.starts_with('#')),
            "a key is set"
        );
    }

    #[test]
    fn shipped_file_has_every_key_with_its_default() {
        let text = uncommented();
        assert_eq!(read(&text).unwrap(), Config::default());
        let written: Vec<&str> = text
            .lines()
            .filter_map(|l| Some(l.split_once(':')?.0))
            .collect();
        let mut sorted = written.clone();
        sorted.sort_unstable();
        let mut expected = keys().to_vec();
        expected.sort_unstable();
        assert_eq!(sorted, expected);
    }

    #[test]
    fn every_key_is_read() {
        // A value other than the default for each key: a field that serde skipped would show.
        let text = "dir: /scratch/%u/ckpt\nengine: criu\nplacement: contained\ndmtcp: [/a, /b]\ndmtcp_conf: /c\ncriu: /d\n\
            apptainer: /e\napptainer_options: [--nv]\nkeep: 3\non_time_limit: exit\ncompleted_stages: rerun\n\
            on_cancel: discard\non_drain: save\non_maintenance: ignore\n\
            on_no_generation: fresh\non_unavailable: run\noutput: append\npreflight: off\n\
            interval: 1h\nmtbf: 7-00:00:00\nsignal: usr1\nlead_time: 90\n\
            safety: 2\ncheckpoint_timeout: 1:00\nrestart_timeout: 2m\nlock_wait: 0\n\
            hold_limit: 1h\nquery_interval: 5s\nrestarts_within_run: 0\nprogress_runs: 0\ncomment: on\n";
        let expected = Config {
            dir: "/scratch/%u/ckpt".into(),
            engine: EngineChoice::Criu,
            placement: PlacementChoice::Contained,
            dmtcp: vec!["/a".into(), "/b".into()],
            dmtcp_conf: Some("/c".into()),
            criu: Some("/d".into()),
            apptainer: Some("/e".into()),
            apptainer_options: vec!["--nv".into()],
            keep: 3,
            on_time_limit: OnTimeLimit::Exit,
            on_cancel: OnCancel::Discard,
            completed_stages: CompletedStages::Rerun,
            on_drain: OnEmptying::Save,
            on_maintenance: OnEmptying::Ignore,
            on_no_generation: OnNoGeneration::Fresh,
            on_unavailable: OnUnavailable::Run,
            output: OutputMode::Append,
            preflight: Preflight::Off,
            interval: Some(Interval::Every(HOUR)),
            mtbf: 7 * DAY,
            signal: Some(Signal::SIGUSR1),
            lead_time: Some(90 * SECOND),
            safety: 2.0,
            checkpoint_timeout: MINUTE,
            restart_timeout: 2 * MINUTE,
            lock_wait: Duration::ZERO,
            hold_limit: HOUR,
            query_interval: 5 * SECOND,
            restarts_within_run: 0,
            progress_runs: 0,
            comment: true,
        };
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(text.lines().count(), keys().len());
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, at, about) in [
            ("keep: 2\nkeeps: 3\n", "line 2, column 1", "keeps"),
            (
                "engine: auto\n\nengine: criu\n",
                "line 3, column 1",
                "engine",
            ),
            (
                "engine: blcr\n",
                "line 1, column 9",
                "`blcr` is none of auto, dmtcp, criu",
            ),
            (
                "keep: 2\nsafety: 0.5\n",
                "line 2, column 9",
                "0.5 is outside of 1.0 to 10.0",
            ),
            ("safety: nan\n", "line 1, column 9", "nan is outside"),
            ("safety: high\n", "line 1, column 9", "`high` is no number"),
            ("keep: 0\n", "line 1, column 7", "0 is outside of 1 to 1000"),
            ("keep: -1\n", "line 1, column 7", "`-1` is no whole number"),
            (
                "keep: 2.5\n",
                "line 1, column 7",
                "`2.5` is no whole number",
            ),
            ("keep:\n", "line 1", ""),
            ("mtbf: soon\n", "line 1, column 7", "`soon` is no duration"),
            ("mtbf: 1s\n", "line 1, column 7", "1s is outside of 60s to"),
            (
                "query_interval: 4s\n",
                "line 1, column 17",
                "4s is outside of 5s to",
            ),
            (
                "on_drain: leave\n",
                "line 1, column 11",
                "`leave` is none of ignore, save",
            ),
            (
                "lead_time: 0\n",
                "line 1, column 12",
                "0 is outside of 1s to",
            ),
            ("interval: 0s\n", "line 1, column 11", "0s is outside"),
            (
                "interval: often\n",
                "line 1, column 11",
                "neither off nor auto",
            ),
            (
                "comment: true\n",
                "line 1, column 10",
                "`true` is none of on, off",
            ),
            ("signal: SIGKILL\n", "line 1, column 9", "cannot be caught"),
            ("dir: relative\n", "line 1, column 6", "no absolute path"),
            ("dir: /x/%j\n", "line 1, column 6", "only %h"),
            (
                "dmtcp: [/a, b]\n",
                "line 1, column 8",
                "`b` is no absolute path",
            ),
            ("- a\n- b\n", "line 1", ""),
            ("a: [\n", "line ", ""),
        ] {
            let message = refusal(text);
            assert!(
                message.starts_with("configuration file /etc/x.yaml, line "),
                "{message}"
            );
            assert!(message.contains(at), "{text:?}: {message}");
            assert!(message.contains(about), "{text:?}: {message}");
            assert_eq!(message.matches("line ").count(), 1, "{message}");
        }
    }

    #[test]
    fn durations() {
        for (text, seconds) in [
            ("0", 0),
            ("90", 90),
            ("30s", 30),
            ("10m", 600),
            ("2h", 7200),
            ("1d", 86_400),
            ("1h30m", 5400),
            ("10:30", 630),
            ("01:00:05", 3605),
            ("2-0", 172_800),
            ("1-12:00", 129_600),
            ("1-12:00:00", 129_600),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "s",
            "-1",
            "+1",
            "1.5h",
            "1w",
            "m10",
            "30m1h",
            "1m1m",
            "1:",
            ":1",
            "1:2:3:4",
            "1-",
            "1-1:1:1:1",
            "1 h",
            "99999999999999999999",
            "18446744073709551615d",
            "999999999999999999-0",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn signals() {
        assert_eq!(request_signal("USR1"), Ok(Signal::SIGUSR1));
        assert_eq!(request_signal("SIGhup"), Ok(Signal::SIGHUP));
        for text in ["", "10", "SIGFOO", "KILL", "TERM", "USR2", "SEGV", "CHLD"] {
            assert!(request_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn store_patterns() {
        let config = Config {
            dir: "/scratch/%u/%u".into(),
            ..Config::default()
        };
        assert_eq!(
            config.store(Path::new("/home/a"), "a"),
            Path::new("/scratch/a/a")
        );
        assert_eq!(
            Config::default().store(Path::new("/home/%u"), "a"),
            Path::new("/home/%u/.container-checkpoint")
        );
    }

    #[test]
    fn a_named_file_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.yaml");
        let error = anyhow::Error::from(Config::load(Some(&path)).unwrap_err());
        let message = format!("{error:#}");
        assert!(message.contains("c.yaml"), "{message}");
        assert_eq!(message.matches("No such file").count(), 1, "{message}");
        std::fs::write(&path, "keep: 9\n").unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap().keep, 9);
        std::fs::write(&path, vec![b'#'; LARGEST_FILE as usize + 1]).unwrap();
        assert!(matches!(
            Config::load(Some(&path)),
            Err(Error::TooLarge { .. })
        ));
        std::fs::write(&path, b"dir: \xff\n").unwrap();
        assert!(matches!(Config::load(Some(&path)), Err(Error::Read { .. })));
    }
}
