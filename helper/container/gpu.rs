//! Whether somebody asked for a GPU, for a container or of Slurm.

use std::ffi::OsString;

use super::command_line::Line;

/// The options of `apptainer exec` that bring a GPU's libraries in, without `--`.
const OPTIONS: [&str; 3] = ["nv", "nvccli", "rocm"];

/// Variables that do the same, and those in which Slurm tells what a job or a command asked for.
const VARIABLES: [&str; 12] = [
    "APPTAINER_NV",
    "APPTAINER_ROCM",
    "SINGULARITY_NV",
    "SINGULARITY_ROCM",
    "SBATCH_GPUS",
    "SALLOC_GPUS",
    "SLURM_GPUS",
    "SLURM_JOB_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_STEP_GPUS",
];

/// The option or variable by which a GPU was asked for: among a user's own `options`, in his command
/// `line` of Apptainer, or by a variable. What a site gives all containers says nothing of one job.
pub fn asked(
    options: &[OsString],
    line: Option<&Line>,
    variable: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let in_options = |name: &&str| options.iter().any(|word| *word == *format!("--{name}"));
    let in_line = |name: &&str| line.is_some_and(|line| line.flags.contains(*name));
    let option = OPTIONS
        .iter()
        .find(|name| in_options(name) || in_line(name));
    let set = |name: &&&str| {
        variable(name).is_some_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
    };
    option.map(|name| format!("--{name}")).or_else(|| {
        let name = VARIABLES.iter().find(set)?;
        Some(format!("${name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_before_variables() {
        let set = |name: &str| (name == "SLURM_GPUS").then(|| "2".to_owned());
        let off = |_: &str| Some("0".to_owned());
        let nv = ["--bind", "--nv"].map(OsString::from);
        assert_eq!(asked(&nv, None, set).as_deref(), Some("--nv"));
        assert_eq!(asked(&nv[..1], None, set).as_deref(), Some("$SLURM_GPUS"));
        assert_eq!(asked(&[], None, off), None);
    }
}
