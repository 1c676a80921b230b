//! The names that plugin and helper share: one name for one thing across option, environment
//! variable and configuration key. Nothing but constants and checks that allocate nothing.

// Two programs include this file, and each uses its part of it.
#![allow(dead_code)]

/// Longest checkpoint NAME, in bytes, before and after `%j %A %a %x %u` are expanded.
pub const NAME_MAX: usize = 64;

/// A text in the plugin by which the helper knows that it is of its own version.
pub const PLUGIN_MARK: &str = concat!(
    "container-checkpoint plugin ",
    env!("CARGO_PKG_VERSION"),
    "\n"
);

/// The releases of Slurm that the plugin has been tried with: the API version that
/// `slurm_api_version()` returns in its upper 16 bits, the release, and how SLURM_VERSION_NUMBER of
/// `slurm/slurm_version.h` has it, year and month in a byte each.
pub const SLURM_RELEASES: &[(i64, &str, u32)] = &[
    (38, "22.05", 0x16_05),
    (39, "23.02", 0x17_02),
    (40, "23.11", 0x17_0b),
    (41, "24.05", 0x18_05),
    (42, "24.11", 0x18_0b),
    (43, "25.05", 0x19_05),
    (44, "25.11", 0x19_0b),
    (45, "26.05", 0x1a_05),
];

/// The variables by which the plugin hands a task's options to the helper (and which people may
/// set themselves for `container-checkpoint run`).
pub mod variable {
    /// The checkpoint NAME as the user wrote it, patterns unexpanded.
    pub const NAME: &str = "CONTAINER_CHECKPOINT";
    /// The container image of this task.
    pub const IMAGE: &str = "CONTAINER_CHECKPOINT_IMAGE";
    /// `auto`, `dmtcp` or `criu`.
    pub const ENGINE: &str = "CONTAINER_CHECKPOINT_ENGINE";
    /// `auto`, `injected` or `contained`.
    pub const PLACEMENT: &str = "CONTAINER_CHECKPOINT_PLACEMENT";
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
    /// How Slurm finds the processes of a step on this node: `cgroup`, `linuxproc`, `pgid`…, the
    /// name of its proctrack plugin.
    pub const PROCTRACK: &str = "CONTAINER_CHECKPOINT_PROCTRACK";
    /// In a batch script whose containers are caught: the directory in PATH that does it.
    pub const STAGES: &str = "CONTAINER_CHECKPOINT_STAGES";
    /// The task's own argv[0], on Slurm without `spank_prepend_task_argv`.
    pub const ARGV0: &str = "CONTAINER_CHECKPOINT_ARGV0";

    /// Those that the plugin sets, or removes where it has no value for them, in a task.
    pub const OF_TASKS: &[&str] = &[
        NAME, IMAGE, ENGINE, PLACEMENT, RESTART, DIR, INTERVAL, SIGNAL, CONFIG, STEP, PROCTRACK,
        STAGES, ARGV0,
    ];
}

/// The words of `--container-checkpoint-engine`.
pub const ENGINES: &[&str] = &["auto", "dmtcp", "criu"];

/// The words of `--container-checkpoint-placement`.
pub const PLACEMENTS: &[&str] = &["auto", "injected", "contained"];

/// The words of `--container-checkpoint-restart`.
pub const RESTARTS: &[&str] = &["auto", "fresh", "require", "force"];

/// The names, without `SIG`, that `--container-checkpoint-signal` takes: signals that nobody else
/// needs here. Slurm ends and stops jobs by TERM, CONT and TSTP, and DMTCP keeps USR2 for itself.
pub const SIGNALS: &[&str] = &[
    "USR1", "HUP", "INT", "QUIT", "ALRM", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR",
];

/// What an engine may be, as a sentence for people.
pub const ENGINE_RULE: &str = "the engine is auto, dmtcp or criu";

/// What a placement may be, as a sentence for people.
pub const PLACEMENT_RULE: &str = "the placement is auto, injected (the node's DMTCP, brought into the \
container) or contained (the container image's own DMTCP)";

/// What the word for restarts may be, as a sentence for people.
pub const RESTART_RULE: &str = "what to do with a saved state is auto (restart if there is one), \
fresh (start anew), require (fail if there is none) or force (restart even where the node or the \
container image differ)";

/// What a container image may be, as a sentence for people.
pub const IMAGE_RULE: &str = "the container image is the path of a SIF file or of a sandbox \
directory; an address such as docker://… has to be made one first, by `apptainer pull`";

/// What `--container-image` does, in the help of Slurm's commands. The helper knows the option by it,
/// whatever its name is at a site.
pub const IMAGE_USAGE: &str = "with --container-checkpoint: run in this container, a SIF file or a \
sandbox directory of Apptainer";

/// What a store may be, as a sentence for people.
pub const DIR_RULE: &str = "the directory that holds the checkpoints is an absolute path; %h (at \
its start) and %u stand for home directory and user";

/// What an interval may be, as a sentence for people.
pub const INTERVAL_RULE: &str = "the interval between checkpoints is off, auto, or a duration of 1 \
second to 30 days such as 90s, 30m, 1h30m, 12:00:00 or 1-12:00:00 (a plain number counts seconds)";

/// What the signal that requests a checkpoint may be, as a sentence for people.
pub const SIGNAL_RULE: &str = "the signal that requests a checkpoint is one of USR1 HUP INT QUIT \
ALRM URG XCPU XFSZ VTALRM PROF WINCH IO PWR, with or without SIG before it (TERM, CONT and TSTP are \
Slurm's, USR2 is DMTCP's)";

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

/// Whether `path` can name a container image.
pub fn is_image(path: &[u8]) -> bool {
    !path.is_empty() && !path.windows(3).any(|three| three == b"://")
}

/// Whether `path` can name a store: absolute, or with `%h` at its start; `%h` and `%u` may stand in
/// it and no other `%`.
pub fn is_dir(path: &[u8]) -> bool {
    if !path.starts_with(b"/") && !path.starts_with(b"%h") {
        return false;
    }
    let mut bytes = path.iter();
    while let Some(byte) = bytes.next() {
        if *byte == b'%' && !matches!(bytes.next(), Some(b'h' | b'u')) {
            return false;
        }
    }
    true
}

/// Whether `text` is `off`, `auto` or a duration of 1 second to 30 days.
pub fn is_interval(text: &[u8]) -> bool {
    let within = |seconds| (1..=30 * 86_400).contains(&seconds);
    matches!(text, b"off" | b"auto") || seconds(text).is_some_and(within)
}

/// Whether `name` is one of [`SIGNALS`], in any case, with or without `SIG` before it.
pub fn is_signal(name: &[u8]) -> bool {
    let short = match name.get(..3) {
        Some(three) if three.eq_ignore_ascii_case(b"SIG") => &name[3..],
        _ => name,
    };
    SIGNALS
        .iter()
        .any(|signal| short.eq_ignore_ascii_case(signal.as_bytes()))
}

/// The seconds of a duration: plain seconds, `1d2h3m4s` with any of the four left out, or Slurm's
/// `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`. None for anything else, or more than a `u64` holds.
pub fn seconds(text: &[u8]) -> Option<u64> {
    if text.contains(&b':') || text.contains(&b'-') {
        clock(text)
    } else {
        units(text)
    }
}

fn units(text: &[u8]) -> Option<u64> {
    if let Some(plain) = number(text) {
        return Some(plain);
    }
    let (mut total, mut last, mut rest) = (0_u64, u64::MAX, text);
    while !rest.is_empty() {
        let at = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        let (digits, tail) = rest.split_at(at);
        let (unit, tail) = tail.split_first()?;
        let unit = match unit {
            b'd' => 86_400,
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        if unit >= last {
            return None;
        }
        total = total.checked_add(number(digits)?.checked_mul(unit)?)?;
        (last, rest) = (unit, tail);
    }
    (last != u64::MAX).then_some(total)
}

fn clock(text: &[u8]) -> Option<u64> {
    let (days, clock) = match text.iter().position(|byte| *byte == b'-') {
        Some(at) => (Some(number(&text[..at])?), &text[at + 1..]),
        None => (None, text),
    };
    let mut fields = clock.split(|byte| *byte == b':').map(number);
    let (first, second, third) = (fields.next()??, fields.next(), fields.next());
    if fields.next().is_some() {
        return None;
    }
    let (hours, minutes, seconds) = match (days, second, third) {
        (Some(_), None, None) => (first, 0, 0),
        (Some(_), Some(second), None) => (first, second?, 0),
        (None, Some(second), None) => (0, first, second?),
        (_, Some(second), Some(third)) => (first, second?, third?),
        (None, None, _) | (_, None, Some(_)) => return None,
    };
    let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    minutes.checked_mul(60)?.checked_add(seconds)
}

/// A number of nothing but digits.
fn number(digits: &[u8]) -> Option<u64> {
    let mut value = (!digits.is_empty()).then_some(0_u64)?;
    for digit in digits {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        value = value.checked_mul(10)?.checked_add(digit)?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "A-b_c.9", "-x", "%x-%j", "%u%A%a", &"n".repeat(64)] {
            assert!(is_name(good.as_bytes(), true), "{good}");
        }
        let long = "n".repeat(65);
        for bad in [
            "", ".", ".a", "a b", "a/b", "ä", "a%", "%%", "%n", "a\n", "a:b", &long,
        ] {
            assert!(!is_name(bad.as_bytes(), true), "{bad}");
        }
        assert!(!is_name(b"%j", false));
    }

    #[test]
    fn durations() {
        for (text, expected) in [
            ("0", 0),
            ("90", 90),
            ("30s", 30),
            ("1h30m", 5400),
            ("1d2h3m4s", 93_784),
            ("2:03", 123),
            ("1:02:03", 3723),
            ("1-12", 129_600),
            ("1-12:30", 131_400),
            ("1-12:30:05", 131_405),
        ] {
            assert_eq!(seconds(text.as_bytes()), Some(expected), "{text}");
        }
        for bad in [
            "",
            "s",
            "-",
            ":",
            "1-",
            "-1",
            "1:",
            ":1",
            "1:2:3:4",
            "1-2:3:4:5",
            "1m2h",
            "1m1m",
            "1 m",
            "+1",
            "1.5h",
            "1h30",
            "1-1h",
            "18446744073709551616",
            "18446744073709551615m",
        ] {
            assert_eq!(seconds(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn intervals_signals_directories_and_images() {
        for good in ["off", "auto", "1", "1m", "30-0"] {
            assert!(is_interval(good.as_bytes()), "{good}");
        }
        for bad in ["", "on", "OFF", "0", "30-0:0:1", "never"] {
            assert!(!is_interval(bad.as_bytes()), "{bad}");
        }
        for good in ["USR1", "sigusr1", "SIGHUP", "Pwr"] {
            assert!(is_signal(good.as_bytes()), "{good}");
        }
        for bad in ["", "SIG", "TERM", "SIGUSR2", "KILL", "10", "SIGSIGHUP"] {
            assert!(!is_signal(bad.as_bytes()), "{bad}");
        }
        for good in ["/", "/scratch/%u/x", "%h", "%h/ckpt"] {
            assert!(is_dir(good.as_bytes()), "{good}");
        }
        for bad in ["", "x", "./x", "~/x", "/a%", "/%j", "/%%", "%u/x"] {
            assert!(!is_dir(bad.as_bytes()), "{bad}");
        }
        assert!(is_image(b"a.sif") && !is_image(b"") && !is_image(b"docker://x"));
    }

    #[test]
    fn the_rules_name_every_word() {
        for (rule, words) in [
            (ENGINE_RULE, ENGINES),
            (PLACEMENT_RULE, PLACEMENTS),
            (RESTART_RULE, RESTARTS),
            (SIGNAL_RULE, SIGNALS),
        ] {
            for word in words {
                assert!(rule.contains(word), "{word} is not in: {rule}");
            }
        }
    }
}
