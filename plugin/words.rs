//! The names that plugin and helper share: one name for one thing across option, environment
//! variable and configuration key. Nothing but constants and checks that allocate nothing.

/// Longest checkpoint NAME, in bytes, before and after `%j %A %a %x %u` are expanded.
pub const NAME_MAX: usize = 64;

/// The variables by which the plugin hands a task's options to the helper (and which people may
/// set themselves for `container-checkpoint run`).
pub mod variable {
    /// The checkpoint NAME as the user wrote it, patterns unexpanded.
    pub const NAME: &str = "CONTAINER_CHECKPOINT";
    /// The container image of this task.
    pub const IMAGE: &str = "CONTAINER_CHECKPOINT_IMAGE";
    /// `auto`, `dmtcp` or `criu`.
    pub const ENGINE: &str = "CONTAINER_CHECKPOINT_ENGINE";
    /// `auto`, `fresh`, `require` or `force`.
    pub const RESTART: &str = "CONTAINER_CHECKPOINT_RESTART";
    /// The store to use instead of the configured one.
    pub const DIR: &str = "CONTAINER_CHECKPOINT_DIR";
    /// `off`, `auto` or a duration.
    pub const INTERVAL: &str = "CONTAINER_CHECKPOINT_INTERVAL";
    /// The signal that requests a checkpoint.
    pub const SIGNAL: &str = "CONTAINER_CHECKPOINT_SIGNAL";
    /// Path of the helper's configuration file, from plugstack.conf's `config=`.
    pub const CONFIG: &str = "CONTAINER_CHECKPOINT_CONFIG";
    /// How much the helper says: `off`, `error`, `warn`, `info` (default), `debug` or `trace`.
    pub const LOG: &str = "CONTAINER_CHECKPOINT_LOG";
    /// `batch` or `step`: what the helper stands in front of.
    pub const STEP: &str = "CONTAINER_CHECKPOINT_STEP";
    /// The task's own argv[0], on Slurm without `spank_prepend_task_argv`.
    pub const ARGV0: &str = "CONTAINER_CHECKPOINT_ARGV0";
}

/// The words of `--container-checkpoint-engine`.
pub const ENGINES: &[&str] = &["auto", "dmtcp", "criu"];

/// The words of `--container-checkpoint-restart`.
pub const RESTARTS: &[&str] = &["auto", "fresh", "require", "force"];

/// What a NAME may be, as a sentence for people.
pub const NAME_RULE: &str = "a checkpoint name has 1 to 64 of the characters A-Z a-z 0-9 . _ - \
and does not start with a dot; %j %A %a %x %u stand for job id, array job id, array task id, job \
name and user, %% is not allowed";

/// Whether `name` is a checkpoint NAME. `patterns` says whether `%j %A %a %x %u` may stand in it.
pub fn is_name(name: &[u8], patterns: bool) -> bool {
    if name.is_empty() || name.len() > NAME_MAX || name[0] == b'.' {
        return false;
    }
    let mut bytes = name.iter();
    while let Some(byte) = bytes.next() {
        let fits = match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => true,
            b'%' if patterns => matches!(bytes.next(), Some(b'j' | b'A' | b'a' | b'x' | b'u')),
            _ => false,
        };
        if !fits {
            return false;
        }
    }
    true
}
