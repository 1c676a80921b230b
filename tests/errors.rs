//! What cannot work: each is refused at once with one sentence in the job's standard error, and
//! nothing hangs or is left.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Spec};
use support::*;

const PYTHON: &str = "--container-image=/images/python.sif";
const STATIC: &str = "--container-image=/images/static.sif";
const CONFIG: &str = "/etc/slurm/container-checkpoint.yaml";

/// For a refusal, with many jobs at once on a small machine.
const AT_ONCE: Duration = Duration::from_secs(60);

/// A job that has to be refused.
struct Case {
    name: String,
    engine: &'static str,
    options: Vec<String>,
    script: String,
    /// What its one error has to say.
    expected: Vec<String>,
}

impl Case {
    /// A batch script in a container, or on the host with a step if `options` go to srun.
    fn new(name: &str, engine: &'static str, options: &[&str], script: &str) -> Case {
        Case {
            name: format!("{engine}-{name}"),
            engine,
            options: options.iter().map(|&word| word.to_owned()).collect(),
            script: format!("#!/bin/bash\n{script}\n"),
            expected: Vec::new(),
        }
    }

    fn says(mut self, words: &[&str]) -> Case {
        self.expected = words.iter().map(|&word| word.to_owned()).collect();
        self
    }
}

/// Submits all, then checks each; what is wrong.
fn refused(cluster: &Cluster, cases: Vec<Case>) -> Result<Vec<String>> {
    let mut jobs = Vec::new();
    for case in cases {
        let mut options = options(case.engine, &case.name);
        options.extend(case.options.iter().cloned());
        jobs.push((sbatch(cluster, &options, &case.script)?, case));
    }
    let mut wrong = Vec::new();
    for (job, case) in jobs {
        let result = cluster
            .wait_end(job, AT_ONCE)
            .and_then(|end| check(cluster, &case, &end["ExitCode"]));
        if let Err(error) = explained(cluster, &case.name, result) {
            wrong.push(format!("{}: {error:#}", case.name));
        }
    }
    Ok(wrong)
}

fn check(cluster: &Cluster, case: &Case, exit_code: &str) -> Result<()> {
    ensure!(exit_code != "0:0", "the job did not fail");
    let text = output(cluster, &case.name)?;
    let errors: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("container-checkpoint: error: "))
        .collect();
    ensure!(errors.len() == 1, "{} errors and not one", errors.len());
    for word in &case.expected {
        ensure!(errors[0].contains(word), "the error does not say {word:?}");
    }
    ensure!(!text.contains("ran on"), "the application has run");
    println!("{}: {}", case.name, errors[0]);
    Ok(())
}

#[test]
fn what_cannot_work_is_refused_at_once() -> Result<()> {
    let cluster = with(&Spec {
        cpus: 16,
        ..spec()?
    })?;
    let shared = "install -d -m 1777 /home/shared && install -d -m 777 -o bob /home/shared/bobs";
    cluster.run("root", shared)?.ok()?;
    musl_program(&cluster)?;
    let mut wrong = at_submission(&cluster)?;
    let mut cases = Vec::new();
    for engine in engines()? {
        cases.extend([
            Case::new(
                "no-image",
                engine,
                &["--container-image=/images/none.sif"],
                "echo ran on",
            )
            .says(&["/images/none.sif", "No such file"]),
            Case::new(
                "bad-image",
                engine,
                &["--container-image=/etc/hostname"],
                "echo ran on",
            )
            .says(&["/etc/hostname", "image format not recognized"]),
            Case::new(
                "unwritable",
                engine,
                &[PYTHON, "--container-checkpoint-dir=/etc/store"],
                "echo ran on",
            )
            .says(&[
                "/etc/store",
                "Permission denied",
                "--container-checkpoint-dir",
            ]),
            Case::new(
                "not-mine",
                engine,
                &[PYTHON, "--container-checkpoint-dir=/home/shared/bobs"],
                "echo ran on",
            )
            .says(&[
                "/home/shared/bobs",
                "belongs to",
                "--container-checkpoint-dir",
            ]),
            Case::new(
                "no-command",
                engine,
                &[],
                &format!("srun {PYTHON} no-such-program || exit"),
            )
            .says(&["no-such-program", "not found"]),
            Case::new(
                "nothing-saved",
                engine,
                &[PYTHON, "--container-checkpoint-restart=require"],
                "echo ran on",
            )
            .says(&["there is no saved state"]),
        ]);
    }
    if have("dmtcp")? {
        cases.extend([
            Case::new(
                "static",
                "dmtcp",
                &[],
                &format!("srun {STATIC} /usr/bin/counter 5 1 || exit"),
            )
            .says(&["statically", "criu"]),
            // Busybox.
            Case {
                script: "#!/bin/sh\necho ran on\n".into(),
                ..Case::new("static-script", "dmtcp", &[STATIC], "")
            }
            .says(&["statically", "criu"]),
            Case::new("musl", "dmtcp", &[], "srun ./musl || exit").says(&["musl", "criu"]),
        ]);
    }
    wrong.extend(refused(&cluster, cases)?);
    for engine in engines()? {
        full(&cluster, engine, &mut wrong)?;
    }
    if let Err(error) = static_runs_under_criu(&cluster) {
        wrong.push(format!("auto-static: {error:#}"));
    }
    wrong.extend(configuration(&cluster)?);
    if let Err(error) = cluster.wait_nothing_left(Duration::from_secs(20)) {
        wrong.push(format!("{error:#}"));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

#[test]
fn a_node_without_dmtcp_says_so() -> Result<()> {
    let cluster = with(&Spec {
        nodes: 1,
        dmtcp: false,
        ..spec()?
    })?;
    let case = Case::new("missing", "dmtcp", &[PYTHON], "echo ran on")
        .says(&["DMTCP is not installed", "dmtcp_launch"]);
    let wrong = refused(&cluster, vec![case])?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    cluster.wait_nothing_left(AT_ONCE)
}

fn engines() -> Result<Vec<&'static str>> {
    Ok(if have("dmtcp")? {
        vec!["criu", "dmtcp"]
    } else {
        vec!["criu"]
    })
}

/// A dynamic program of another libc, in alice's home.
fn musl_program(cluster: &Cluster) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (source, program) = (directory.path().join("a.c"), directory.path().join("a"));
    std::fs::write(&source, "int main(void) { return 0; }\n")?;
    let built = Command::new("musl-gcc")
        .arg("-o")
        .args([&program, &source])
        .output()
        .context("cannot run musl-gcc (tests/setup.sh installs it)")?;
    ensure!(built.status.success(), "{built:?}");
    let target = cluster.path("/home/alice/musl");
    std::fs::copy(&program, &target)?;
    Ok(std::fs::set_permissions(
        &target,
        std::fs::Permissions::from_mode(0o755),
    )?)
}

/// Refused before there is a job, and by the command in the same words.
fn at_submission(cluster: &Cluster) -> Result<Vec<String>> {
    let name_rule = "1 to 64 of the characters";
    let engine_rule = "auto, dmtcp";
    let mut wrong = Vec::new();
    for (submit, run, rule) in [
        ("--container-checkpoint=a/b", "--name a/b", name_rule),
        ("--container-checkpoint=.a", "--name .a", name_rule),
        ("--container-checkpoint=a%n", "--name a%n", name_rule),
        (
            "--container-checkpoint=a --container-checkpoint-engine=blcr",
            "--name a --engine blcr",
            engine_rule,
        ),
    ] {
        for command in [
            format!("sbatch {submit} --wrap=true"),
            format!("srun {submit} true"),
            format!("container-checkpoint run {run} -- true"),
        ] {
            let output = cluster.run("alice", &command)?;
            if output.status.success() || !output.stderr.contains(rule) {
                wrong.push(format!("{command}: {output:?}"));
            }
        }
    }
    Ok(wrong)
}

/// A store without room: at the start, and for a checkpoint.
fn full(cluster: &Cluster, engine: &'static str, wrong: &mut Vec<String>) -> Result<()> {
    let root = |script: &str| cluster.run_on("n1", "root", script)?.ok();
    let (small, large) = (
        format!("/home/shared/{engine}-small"),
        format!("/home/shared/{engine}-large"),
    );
    // The larger one holds the programs for the container, in a debug build, and little more.
    root(&format!(
        "mkdir {small} {large} && mount -t tmpfs -o size=200k,mode=1777 small {small} && \
         mount -t tmpfs -o size=400m,mode=1777 large {large}"
    ))?;
    let dir = format!("--container-checkpoint-dir={small}/alice");
    let options = [PYTHON, "--nodelist=n1", &dir];
    let case = Case::new("full", engine, &options, "echo ran on")
        .says(&[&small, "No space left on device"]);
    wrong.extend(refused(cluster, vec![case])?);
    let result = full_later(cluster, engine, &large);
    if let Err(error) = explained(cluster, &format!("{engine}-later"), result) {
        wrong.push(format!("{engine}-later: {error:#}"));
    }
    root(&format!("umount {small} && umount {large}"))?;
    Ok(())
}

fn full_later(cluster: &Cluster, engine: &str, store: &str) -> Result<()> {
    let name = format!("{engine}-later");
    let mut options = options(engine, &name);
    options.extend([
        PYTHON.to_owned(),
        "--nodelist=n1".to_owned(),
        format!("--container-checkpoint-dir={store}/alice"),
        "--container-checkpoint-signal=USR1".to_owned(),
    ]);
    let script = format!("#!/bin/bash\nexec python3 lines.py {name}.gate\n");
    let job = sbatch(cluster, &options, &script)?;
    wait_progress(cluster, &name, 5)?;
    // All but some kilobytes, in which a record or two can be written.
    let fill = format!(
        "dd if=/dev/zero of={store}/fill bs=64k status=none; truncate -s -64k {store}/fill"
    );
    cluster.run_on("n1", "root", &fill)?;
    let request = format!("scancel --batch --signal=USR1 {job}");
    cluster.run("alice", &request)?.ok()?;
    cluster.wait_file(format!("/home/alice/{name}.out"), AT_ONCE, |text| {
        text.contains("the checkpoint failed, the application runs on: the checkpoint needs about")
    })?;
    wait_progress(cluster, &name, 5)?;
    open_gate(cluster, &name)?;
    let end = cluster.wait_end(job, AT_ONCE)?;
    ensure!(end["ExitCode"] == "0:0", "{end:?}");
    exact(&output(cluster, &name)?)
}

fn static_runs_under_criu(cluster: &Cluster) -> Result<()> {
    let name = "auto-static";
    let script = format!("#!/bin/bash\nsrun {STATIC} /usr/bin/counter 5 1\n");
    let job = sbatch(cluster, &options("auto", name), &script)?;
    let end = cluster.wait_end(job, AT_ONCE)?;
    let text = output(cluster, name)?;
    ensure!(end["ExitCode"] == "0:0", "{end:?}\n{text}");
    ensure!(
        text.contains("under criu") && text.contains("hash "),
        "{text}"
    );
    Ok(())
}

/// The site's configuration is wrong, or leads nowhere.
fn configuration(cluster: &Cluster) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for (text, case) in [
        (
            "keep: 3\nkeeep: 4\n",
            Case::new("bad-config", "criu", &[PYTHON], "echo ran on")
                .says(&[CONFIG, "line 2", "keeep"]),
        ),
        (
            "criu: /nowhere/criu\n",
            Case::new("missing", "criu", &[PYTHON], "echo ran on").says(&["/nowhere/criu"]),
        ),
    ] {
        cluster.write("root", CONFIG, text)?;
        wrong.extend(refused(cluster, vec![case])?);
    }
    cluster.run("root", &format!("rm {CONFIG}"))?.ok()?;
    Ok(wrong)
}
