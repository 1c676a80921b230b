//! `lab`: a Slurm cluster by hand. See `lab --help`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lab::{Cluster, Release, Spec};

const USAGE: &str = "\
usage: lab shell [RELEASE]        open a shell as alice on a fresh cluster
       lab run [RELEASE] 'LINE'   run a line of shell as alice and exit with its code
       lab prepare                make all root file systems and container images
RELEASE is old-slurm (Slurm 22.05), trixie (24.11, default) or sid (26.05).
The plugin and helper are those of target/release or target/debug, whichever were built last.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match command(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(arguments: &[&str]) -> Result<ExitCode> {
    let release = |name: &str| {
        Release::from_name(name).with_context(|| format!("{name:?} is no release\n{USAGE}"))
    };
    match arguments {
        ["prepare"] => {
            lab::prepare()?;
            Ok(ExitCode::SUCCESS)
        }
        ["shell"] => shell(Release::Trixie),
        ["shell", name] => shell(release(name)?),
        ["run", line] => run(Release::Trixie, line),
        ["run", name, line] => run(release(name)?, line),
        ["--help" | "-h"] => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("{USAGE}"),
    }
}

fn shell(release: Release) -> Result<ExitCode> {
    let cluster = start(release)?;
    if std::io::stderr().is_terminal() {
        eprintln!("lab: you are alice; `sinfo`, `sbatch`, /images; leave with `exit`");
    }
    // With a terminal of the cluster's own: this one has no name in there.
    enter(
        &cluster,
        &[
            "script",
            "--quiet",
            "--return",
            "--command",
            "bash -l",
            "/dev/null",
        ],
    )
}

fn run(release: Release, line: &str) -> Result<ExitCode> {
    let cluster = start(release)?;
    enter(&cluster, &["sh", "-c", line])
}

/// Runs a command as alice with the terminal's own streams.
fn enter(cluster: &Cluster, argv: &[&str]) -> Result<ExitCode> {
    let status = cluster
        .command(None, "alice", argv)?
        .status()
        .context("cannot run nsenter")?;
    // A shell's way to tell of a death by signal.
    let code = status
        .code()
        .or_else(|| Some(128 + std::os::unix::process::ExitStatusExt::signal(&status)?));
    Ok(code
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

fn start(release: Release) -> Result<Cluster> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let built = |name: &str| -> Option<PathBuf> {
        ["release", "debug"]
            .map(|profile| workspace.join("target").join(profile).join(name))
            .into_iter()
            .max_by_key(|path| path.metadata().and_then(|file| file.modified()).ok())
            .filter(|path| path.exists())
    };
    let plugin = built("libcontainer_checkpoint.so");
    let helper = built("container-checkpoint");
    for (what, path) in [("plugin", &plugin), ("helper", &helper)] {
        match path {
            Some(path) => eprintln!("lab: {what} {}", path.display()),
            None => eprintln!("lab: without the {what}: it is not built"),
        }
    }
    let config = std::fs::read_to_string(workspace.join("slurm/container-checkpoint.yaml")).ok();
    if config.is_none() {
        eprintln!("lab: without a configuration: slurm/container-checkpoint.yaml is not there");
    }
    Cluster::start(&Spec {
        release,
        plugin,
        helper,
        config,
        ..Spec::default()
    })
}
