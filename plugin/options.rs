//! The options of `sbatch`, `srun` and `salloc`: what each is called, what it may be given, and by
//! which variable its value reaches the helper. Pure data and checks; Slurm is not seen here.

use crate::words::{self, variable};

/// The name by which Slurm knows this plugin, in its log and in the names of variables.
pub const PLUGIN: &str = "container-checkpoint";

/// An option with a value.
pub struct JobOption {
    /// Name without the leading `--`. That of [`IMAGE`] may be another one, by `image-option=`.
    pub name: &'static str,
    pub arginfo: &'static str,
    pub usage: &'static str,
    /// The variable of the task that carries the value to the helper.
    pub variable: &'static str,
    fits: fn(&[u8]) -> bool,
    /// What may be given, as a sentence.
    rule: &'static str,
}

/// Index of `--container-checkpoint` in [`OPTIONS`]: without it none of the others does anything.
pub const NAME: usize = 0;

/// Index of `--container-image` in [`OPTIONS`].
pub const IMAGE: usize = 1;

/// All options; their order is that of `--help`. Slurm takes names of at most 75 bytes
/// (SPANK_OPTION_MAXLEN of `slurm/spank.h`).
pub const OPTIONS: [JobOption; 8] = [
    JobOption {
        name: "container-checkpoint",
        arginfo: "NAME",
        usage: "make this job resumable: it is saved under NAME when it is pre-empted or reaches \
                its time limit, and goes on from there when it runs again",
        variable: variable::NAME,
        fits: |value| words::is_name(value, true),
        rule: words::NAME_RULE,
    },
    JobOption {
        name: "container-image",
        arginfo: "IMAGE",
        usage: words::IMAGE_USAGE,
        variable: variable::IMAGE,
        fits: words::is_image,
        rule: words::IMAGE_RULE,
    },
    JobOption {
        name: "container-checkpoint-engine",
        arginfo: "ENGINE",
        usage: "what saves and restores processes: auto, dmtcp or criu",
        variable: variable::ENGINE,
        fits: |value| one_of(words::ENGINES, value),
        rule: words::ENGINE_RULE,
    },
    JobOption {
        name: "container-checkpoint-restart",
        arginfo: "WHEN",
        usage: "restart from a saved state if there is one (auto), never (fresh), always \
                (require), or even where it may not fit (force)",
        variable: variable::RESTART,
        fits: |value| one_of(words::RESTARTS, value),
        rule: words::RESTART_RULE,
    },
    JobOption {
        name: "container-checkpoint-dir",
        arginfo: "PATH",
        usage: "directory that holds the checkpoints, instead of the configured one",
        variable: variable::DIR,
        fits: words::is_dir,
        rule: words::DIR_RULE,
    },
    JobOption {
        name: "container-checkpoint-interval",
        arginfo: "INTERVAL",
        usage: "save now and then as well: off, auto, or a duration such as 30m",
        variable: variable::INTERVAL,
        fits: words::is_interval,
        rule: words::INTERVAL_RULE,
    },
    JobOption {
        name: "container-checkpoint-signal",
        arginfo: "SIGNAL",
        usage: "save when this signal comes, such as USR1 from scancel --signal",
        variable: variable::SIGNAL,
        fits: words::is_signal,
        rule: words::SIGNAL_RULE,
    },
    JobOption {
        name: "container-checkpoint-placement",
        arginfo: "PLACEMENT",
        usage: "where DMTCP comes from: the node (injected), the container image (contained), or the \
                image if it has its own (auto)",
        variable: variable::PLACEMENT,
        fits: |value| one_of(words::PLACEMENTS, value),
        rule: words::PLACEMENT_RULE,
    },
];

impl JobOption {
    /// Checks a value; `name` is what the option is called here. The error is for the user.
    pub fn check(&self, name: &str, value: &[u8]) -> Result<(), String> {
        if (self.fits)(value) {
            return Ok(());
        }
        let value = String::from_utf8_lossy(value);
        Err(format!("--{name}={value} is not possible: {}", self.rule))
    }
}

/// The variable in which `sbatch` and `salloc` leave an option for the `srun`s of the job, and by
/// which people may give it: `spank_process_env_options()` and `_opt_env_name()` in Slurm's
/// `src/common/spank.c`, `plugstack.c` before 23.02.
pub fn environment_form(name: &str) -> String {
    format!("SLURM_SPANK_{}", passing_form(name))
}

/// The variable by which an option travels to a batch step; `salloc` leaves it set.
pub fn passing_form(name: &str) -> String {
    let mut form = format!("_SLURM_SPANK_OPTION_{PLUGIN}_{name}").into_bytes();
    for byte in &mut form {
        if !byte.is_ascii_alphanumeric() {
            *byte = b'_';
        }
    }
    String::from_utf8_lossy(&form).into_owned()
}

fn one_of(words: &[&str], value: &[u8]) -> bool {
    words.iter().any(|word| word.as_bytes() == value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_and_names_are_what_they_should_be() {
        assert_eq!(OPTIONS[NAME].variable, variable::NAME);
        assert_eq!(OPTIONS[IMAGE].variable, variable::IMAGE);
        for option in &OPTIONS {
            assert!(option.name.len() <= 75, "{}", option.name);
            let word = |c: char| c.is_ascii_uppercase();
            assert!(option.arginfo.chars().all(word), "{}", option.arginfo);
            assert!(
                !option.usage.is_empty() && !option.usage.contains("  "),
                "{}",
                option.usage
            );
        }
    }

    #[test]
    fn a_refusal_names_option_value_and_rule() {
        assert_eq!(OPTIONS[2].check(OPTIONS[2].name, b"criu"), Ok(()));
        assert_eq!(
            OPTIONS[2].check(OPTIONS[2].name, b"blcr"),
            Err("--container-checkpoint-engine=blcr is not possible: \
                 the engine is auto, dmtcp or criu"
                .to_owned())
        );
        assert!(OPTIONS[NAME].check("x", b"\xff").is_err());
    }

    #[test]
    fn the_environment_form_is_slurms() {
        assert_eq!(
            environment_form("container-image"),
            "SLURM_SPANK__SLURM_SPANK_OPTION_container_checkpoint_container_image"
        );
        assert_eq!(
            passing_form("container-image"),
            "_SLURM_SPANK_OPTION_container_checkpoint_container_image"
        );
    }
}
