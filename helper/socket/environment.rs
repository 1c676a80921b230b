//! Values of this run for applications that were restored with those of an earlier one.
//!
//! A restored process has the environment that it was saved with: Slurm's node names, counts and
//! GPUs of a run that is over. The file here holds those of the present run, as a script that a shell
//! can read with `.`; `docs/inside.md` says how.
//!
//! Contract: nothing but names that are listed here is written. An environment holds secrets
//! (SLURM_JWT, keys of other programs), and the file outlives the job in the store.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::shell;

/// Beginnings of names of Slurm's output variables (srun(1), sbatch(1)). Not all of `SLURM_`:
/// SLURM_JWT is a password, and SLURM_EXPORT_ENV and SLURM_SPANK_… hold what users give.
const PREFIXES: &[&str] = &[
    "SLURM_ARRAY_",
    "SLURM_CPUS_",
    "SLURM_CPU_BIND",
    "SLURM_GPUS",
    "SLURM_HET_",
    "SLURM_JOB_",
    "SLURM_MEM_",
    "SLURM_NTASKS",
    "SLURM_SHARDS_",
    "SLURM_STEP_",
    "SLURM_SUBMIT_",
    "SLURM_TASKS_PER_NODE",
    "SLURM_THREADS_PER_",
    "SLURM_TOPOLOGY_",
    "SLURM_TRES_",
];

/// Whole names. Those that this run does not have are unset by the file.
const NAMES: &[&str] = &[
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "NVIDIA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "SLURMD_NODENAME",
    "SLURM_CLUSTER_NAME",
    "SLURM_DISTRIBUTION",
    "SLURM_GTIDS",
    "SLURM_JOBID",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_LOCALID",
    "SLURM_NNODES",
    "SLURM_NODEID",
    "SLURM_NODELIST",
    "SLURM_NPROCS",
    "SLURM_PROCID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEPID",
    "SLURM_TASK_PID",
    "TMPDIR",
    "ZE_AFFINITY_MASK",
];

/// Writes the file, whole or not at all, for this process's environment.
pub fn write(path: &Path) -> io::Result<()> {
    let variables: Vec<_> = std::env::vars_os().collect();
    let text = text(
        variables
            .iter()
            .map(|(name, value)| (name.as_os_str(), value.as_os_str())),
    );
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&text)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn text<'a>(variables: impl Iterator<Item = (&'a OsStr, &'a OsStr)>) -> Vec<u8> {
    let mut listed: Vec<(&str, &OsStr)> = variables
        .filter_map(|(name, value)| Some((name.to_str()?, value)))
        .filter(|(name, _)| is_listed(name))
        .collect();
    listed.sort_unstable();
    let mut text = b"# Slurm's variables in this run. Read it with: . FILE\n".to_vec();
    for name in NAMES
        .iter()
        .filter(|name| listed.iter().all(|(other, _)| other != *name))
    {
        text.extend_from_slice(format!("unset {name}\n").as_bytes());
    }
    for (name, value) in listed {
        text.extend_from_slice(format!("export {name}=").as_bytes());
        text.extend(shell::quoted(value.as_bytes()));
        text.push(b'\n');
    }
    text
}

fn is_listed(name: &str) -> bool {
    let is_name = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let listed = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    is_name && listed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// What a shell has after it has read the file.
    fn after(variables: &[(&str, &str)], show: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("environment");
        let variables = variables
            .iter()
            .map(|(name, value)| (OsStr::new(name), OsStr::new(value)));
        std::fs::write(&path, text(variables)).unwrap();
        let out = Command::new("/bin/sh")
            .args(["-euc", &format!(". \"$1\"; {show}"), "sh"])
            .arg(&path)
            .env("CUDA_VISIBLE_DEVICES", "0,1")
            .env("SLURM_JOB_NODELIST", "old")
            .output()
            .unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        out.stdout
    }

    #[test]
    fn a_shell_reads_what_was_there() {
        let hostile = "a'b\"$(id)`id`\\ \n;#'";
        let nodes = after(
            &[("SLURM_JOB_NODELIST", hostile)],
            "printf %s \"$SLURM_JOB_NODELIST\"",
        );
        assert_eq!(nodes, hostile.as_bytes());
        let inherited = after(&[("SLURMD_NODENAME", "n2")], "env | grep SLURMD_NODENAME");
        assert_eq!(inherited, b"SLURMD_NODENAME=n2\n");
    }

    #[test]
    fn what_this_run_does_not_have_is_unset() {
        let show = "echo ${CUDA_VISIBLE_DEVICES-none} $SLURM_JOB_NODELIST";
        assert_eq!(after(&[], show), b"none old\n");
        assert_eq!(after(&[("CUDA_VISIBLE_DEVICES", "3")], show), b"3 old\n");
    }

    #[test]
    fn nothing_else_is_written() {
        let secrets = [
            ("SLURM_JWT", "secret"),
            ("SLURM_SPANK_TOKEN", "secret"),
            ("SLURM_EXPORT_ENV", "KEY=secret"),
            ("SLURM_JOB_X=y;rm", "secret"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("PATH", "secret"),
        ];
        let variables = secrets
            .iter()
            .map(|(name, value)| (OsStr::new(name), OsStr::new(value)));
        let text = String::from_utf8(text(variables)).unwrap();
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn the_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("environment");
        write(&path).unwrap();
        write(&path).unwrap();
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .contains("unset SLURM_JOBID")
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
