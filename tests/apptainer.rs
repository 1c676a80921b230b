//! Scripts that call Apptainer already: `srun apptainer exec|run …` under the option, with nothing
//! else changed.

mod support;

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, ensure};
use lab::{Cluster, Spec};
use support::*;

const IMAGE: &str = "/images/python.sif";

/// Says how it sees options, before lines.py and after.
const OPTIONS: &str = include_str!("programs/options.py");

/// Options that take away all that is not given by others, and what the application then sees:
/// its directory, its variables X, FROM_FILE and OF_THE_HOST, whether what is bound by a variable
/// of Apptainer's and alice's home are there.
const CONTAINED: (&str, &str) = (
    "--cleanenv --contain --pid --no-init --pwd /t --env=X=kept --env-file file.env \
     -B /home/alice/t:/t",
    "/t kept file None True False",
);

/// A job that is pre-empted once, and what it runs.
struct Job {
    engine: &'static str,
    name: String,
    script: String,
    /// What it says of its options.
    facts: Option<&'static str>,
}

#[test]
fn scripts_that_call_apptainer_go_on() -> Result<()> {
    let cluster = &with(&Spec {
        cpus: 16,
        ..spec()?
    })?;
    prepare(cluster)?;
    let mut jobs = Vec::new();
    for engine in ["criu", "dmtcp"] {
        if have(engine)? {
            jobs.extend(of(engine));
        }
    }
    let mut ids = Vec::new();
    for job in &jobs {
        let options = options(job.engine, &job.name);
        let id = sbatch(cluster, &options, &job.script)?;
        ids.push(id);
    }
    let mut nodes = BTreeSet::new();
    for (job, id) in jobs.iter().zip(&ids) {
        nodes.insert(node(cluster, *id)?);
        explained(cluster, &job.name, wait_progress(cluster, &job.name, 20))?;
    }
    let intruders = nodes.iter().map(|node| Intruder::on(cluster, node));
    let intruders = intruders.collect::<Result<Vec<_>>>()?;
    // Meanwhile, what needs no node.
    let aside = [
        ("errors", errors(cluster)),
        ("options", options_of_the_installed(cluster)),
        ("without the plugin", without_plugin(cluster)),
    ];
    for (job, id) in jobs.iter().zip(&ids) {
        let left = cluster.wait_job(*id, LIMIT, |job| {
            job["JobState"] == "PENDING" || job["Restarts"] == "1"
        });
        explained(cluster, &job.name, left)?;
    }
    for intruder in intruders {
        intruder.leave(cluster)?;
    }
    let mut failed = Vec::new();
    for (job, id) in jobs.iter().zip(&ids) {
        let result = explained(cluster, &job.name, resumed(cluster, job, *id));
        failed.extend(result.err().map(|why| format!("{}: {why:#}", job.name)));
    }
    for (what, result) in aside {
        failed.extend(result.err().map(|why| format!("{what}: {why:#}")));
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    cluster.wait_nothing_left(LIMIT)
}

/// What the scripts use: programs, a file of variables, and an image with a runscript and an app.
fn prepare(cluster: &Cluster) -> Result<()> {
    cluster.run("alice", "mkdir -p t data app")?.ok()?;
    cluster.write("alice", "/home/alice/t/lines.py", LINES)?;
    cluster.write("alice", "/home/alice/t/options.py", OPTIONS)?;
    cluster.write("alice", "/home/alice/data/mark", "")?;
    cluster.write("alice", "/home/alice/file.env", "FROM_FILE=file\n")?;
    let make = format!(
        "apptainer --silent build --force --sandbox app {IMAGE} >/dev/null && cd app && \
         mkdir -p scif/apps/nine/scif && \
         printf '#!/bin/sh\\nexec python3 \"$@\"\\n' >.singularity.d/runscript && \
         printf '#!/bin/sh\\necho \"the app has $*\"\\nexit 9\\n' >scif/apps/nine/scif/runscript && \
         chmod 755 .singularity.d/runscript scif/apps/nine/scif/runscript"
    );
    cluster.run("alice", &make)?.ok().map(drop)
}

/// The jobs for one engine.
fn of(engine: &'static str) -> Vec<Job> {
    let (options, facts) = CONTAINED;
    let contained = format!("{engine}-exec");
    let runscript = format!("{engine}-run");
    vec![
        Job {
            engine,
            script: format!(
                "#!/bin/bash\nexport OF_THE_HOST=yes\n\
                 srun env APPTAINER_BIND=/home/alice/data:/data nice -n 1 apptainer --quiet exec {options} {IMAGE} \
                 python3 options.py lines.py /t/{contained}.gate 7\n\
                 echo \"after: $?\"\n"
            ),
            name: contained,
            facts: Some(facts),
        },
        // The other name, an image that is a directory, the runscript and its arguments.
        Job {
            engine,
            script: format!(
                "#!/bin/bash\nsrun singularity run -B data:/data app t/lines.py t/{runscript}.gate 7\n\
                 echo \"after: $?\"\n"
            ),
            name: runscript,
            facts: None,
        },
    ]
}

/// Sees a job that was pre-empted to its end.
fn resumed(cluster: &Cluster, job: &Job, id: u32) -> Result<()> {
    let name = &job.name;
    wait_run(cluster, id, 1)?;
    cluster.write("alice", format!("/home/alice/t/{name}.gate"), "")?;
    let end = cluster.wait_end(id, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    let text = output(cluster, name)?;
    exact(&text)?;
    ensure!(text.ends_with("after: 7\n"), "{text}");
    ensure!(text.contains("goes on from generation 1"), "{text}");
    if let Some(facts) = job.facts {
        for when in ["first", "last"] {
            let line = format!("{when} {facts}");
            ensure!(text.lines().any(|l| l == line), "no line {line:?}:\n{text}");
        }
    }
    Ok(())
}

/// What cannot be run so, each by its name, and what is passed on as it is.
fn errors(cluster: &Cluster) -> Result<()> {
    let run = "container-checkpoint run --name errors --engine criu --";
    for (line, code, said) in [
        (
            "apptainer exec --no-such app true",
            1,
            "apptainer exec has no option --no-such: ",
        ),
        (
            "apptainer -Z exec app true",
            1,
            "apptainer has no option -Z: ",
        ),
        (
            "apptainer exec --bind",
            1,
            "the option --bind of apptainer exec needs a value",
        ),
        (
            "apptainer exec app",
            1,
            "apptainer exec needs a command to run in the container; see `apptainer exec --help`",
        ),
        (
            "apptainer exec docker://debian true",
            1,
            "the image docker://debian is an address: pull it into a file first (`apptainer pull \
             app.sif docker://debian`)",
        ),
        (
            "apptainer run instance://one",
            1,
            "instance://one is a running instance, ",
        ),
        (
            "apptainer exec --sharens app true",
            1,
            "the option --sharens of apptainer exec cannot be combined with checkpoints: ",
        ),
        (
            "apptainer exec --no-mount sys,proc app true",
            1,
            "the option --no-mount proc of apptainer exec cannot be combined with checkpoints: ",
        ),
        (
            "apptainer exec --writable app true",
            1,
            "the option --writable cannot be combined with checkpoints as it is: Apptainer then \
             makes no directory for what is bound into the image. Make one \
             (`mkdir /home/alice/app/.container-checkpoint`)",
        ),
        (
            "apptainer exec none.sif true",
            1,
            "cannot use the image none.sif: No such file or directory (os error 2); check the path: \
             every node has to see the image there",
        ),
        (
            "/nowhere/apptainer exec app true",
            1,
            "/nowhere/apptainer is not in PATH on this node",
        ),
        (
            "timeout 60 apptainer exec app true",
            1,
            "`timeout` starts the container itself, and no engine can hold one from outside; let \
             apptainer start it inside: `apptainer exec IMAGE timeout … COMMAND`",
        ),
        (
            "bash -c 'cd; apptainer exec app true'",
            1,
            "`bash -c '…'` starts containers itself, and no engine can hold them from outside; write \
             each `apptainer` line as a step of its own (`srun apptainer …`)",
        ),
        (
            "env -i apptainer exec app true",
            1,
            "`env -i` before apptainer cannot be combined with checkpoints: it takes away",
        ),
        (
            "apptainer inspect app",
            0,
            "apptainer inspect runs without checkpoints: it starts no application of its own",
        ),
        // Its own exit code and words.
        (
            "singularity run --app nine app a b",
            9,
            "errors starts under criu ",
        ),
    ] {
        let out = cluster.run("alice", &format!("{run} {line}"))?;
        let stderr = &out.stderr;
        ensure!(
            out.status.code() == Some(code) && stderr.contains(said),
            "{line}: {out:?}"
        );
        let app = line.contains("--app nine");
        ensure!(!app || out.stdout == "the app has a b\n", "{line}: {out:?}");
    }
    let typed =
        format!("script --quiet --return --command '{run} apptainer exec app bash' t/typed");
    let out = cluster.run("alice", &typed)?;
    let said = "criu: a shell into which somebody types cannot go on";
    ensure!(
        out.status.code() == Some(1) && out.stdout.contains(said),
        "{out:?}"
    );
    let becomes = format!("{run} nice -n 3 env X=1 apptainer exec app sh -c 'echo $X; nice'");
    let said = cluster.run("alice", &becomes)?.ok()?;
    ensure!(said == "1\n3\n", "{said}");
    let sharens = format!("APPTAINER_SHARENS=1 {run} apptainer exec app true");
    let out = cluster.run("alice", &sharens)?;
    ensure!(
        out.stderr
            .contains("the option --sharens of apptainer exec cannot be combined"),
        "{out:?}"
    );
    let gpus = format!("SLURM_JOB_GPUS=0 {run} apptainer exec --nv app true");
    let out = cluster.run("alice", &gpus)?;
    let said = "--nv gives the application the GPUs that this job has (SLURM_JOB_GPUS)";
    ensure!(
        out.status.code() == Some(1) && out.stderr.contains(said),
        "{out:?}"
    );
    let sandbox =
        format!("APPTAINER_CONTAIN=1 {run} apptainer exec --nv --writable-tmpfs app true");
    let out = cluster.run("alice", &sandbox)?;
    for said in [
        "a GPU is asked for (--nv)",
        "--contain gives the application directories such as /tmp that are gone with the container",
        "--writable-tmpfs: what the application writes into the image is gone",
    ] {
        ensure!(
            out.status.success() && out.stderr.contains(said),
            "{said}: {out:?}"
        );
    }
    let workdir = format!("APPTAINER_WORKDIR=/home/alice {run} apptainer exec -C app true");
    let out = cluster.run("alice", &workdir)?;
    ensure!(
        out.status.success() && !out.stderr.contains("warning"),
        "{out:?}"
    );
    // A program of that name that is no link is SingularityCE, which has other variables.
    let other = "mkdir -p ce && cp /usr/bin/apptainer ce/singularity";
    cluster.run("alice", other)?.ok()?;
    let ce = format!("{run} ce/singularity exec app true");
    let out = cluster.run("alice", &ce)?;
    let said = "singularity is SingularityCE, whose exec has no --underlay";
    ensure!(
        out.status.code() == Some(1) && out.stderr.contains(said),
        "{out:?}"
    );
    if !have("dmtcp")? {
        return Ok(());
    }
    let ce = run.replace("criu", "dmtcp")
        + " ce/singularity -q exec -e app sh -c 'echo $CONTAINER_CHECKPOINT_SOCKET'";
    let said = cluster.run("alice", &ce)?.ok()?;
    ensure!(said == "/.container-checkpoint/work/socket\n", "{said}");
    let net = run.replace("criu", "dmtcp") + " apptainer exec --net --network none app true";
    let out = cluster.run("alice", &net)?;
    let said =
        "DMTCP cannot reach its coordinator from a container that has a network of its own (--net)";
    ensure!(
        out.status.code() == Some(1) && out.stderr.contains(said),
        "{out:?}"
    );
    Ok(())
}

/// What the helper learnt of every option that the installed Apptainer's help shows, against what
/// Apptainer does: one that takes no value leaves the `--help` behind it alone.
fn options_of_the_installed(cluster: &Cluster) -> Result<()> {
    cluster
        .run(
            "alice",
            "for action in exec run; do container-checkpoint run --dir /home/alice/learnt --name x \
             -- apptainer $action --pwd / --underlay=false --no-such; done 2>/dev/null; true",
        )?
        .ok()?;
    let memory = std::fs::read_to_string(cluster.path("/home/alice/learnt/.options.json"))?;
    let memory: serde_json::Value = serde_json::from_str(&memory)?;
    for action in ["exec", "run"] {
        let learnt = memory[0]["options"][action]
            .as_array()
            .with_context(|| format!("nothing was learnt of {action}: {memory}"))?;
        let mut learnt: Vec<String> = learnt
            .iter()
            .flat_map(|flag| {
                let value = flag["value"] == true;
                let name = format!("--{}", flag["name"].as_str().unwrap_or_default());
                let short = flag["short"].as_str().map(|short| format!("-{short}"));
                [Some(name), short]
                    .into_iter()
                    .flatten()
                    .map(move |option| format!("{option} {value}"))
            })
            .collect();
        learnt.sort();
        let ask = format!(
            "for option in --pwd --underlay $(apptainer help {action} | sed -n '/^Options:/,/^Examples:/p' | \
             grep -oE '^ {{2,6}}-[^ ]+( --[^ ]+)?' | tr -d ,); do \
             if apptainer {action} $option --help >/dev/null 2>&1; then printf '%s\\n' \"$option false\"; \
             else printf '%s\\n' \"$option true\"; fi; done"
        );
        let told = cluster.run("alice", &ask)?.ok()?;
        let mut told: Vec<&str> = told.lines().collect();
        told.sort_unstable();
        ensure!(told.len() > 80, "{told:?}");
        ensure!(learnt == told, "{action}:\n{learnt:?}\n{told:?}");
    }
    Ok(())
}

/// `container-checkpoint run -- apptainer …` outside of Slurm, ended and started again.
fn without_plugin(cluster: &Cluster) -> Result<()> {
    let engine = if have("dmtcp")? { "dmtcp" } else { "criu" };
    let name = "by-hand";
    // By a shell that reads its commands; those that were done are not done again.
    let commands = format!(
        "python3 /t/lines.py /t/{name}.gate 7; code=$?\necho shell $SHELL $code\nexit $code\n"
    );
    cluster.write("alice", format!("/home/alice/{name}.sh"), &commands)?;
    let command = format!(
        "container-checkpoint run --name {name} --engine {engine} -- apptainer shell --compat \
         -B /home/alice/t:/t {IMAGE} <{name}.sh >>{name}.out 2>&1"
    );
    let script = format!("{command} & echo $! >{name}.pid; wait $!");
    let result = std::thread::scope(|scope| {
        let first = scope.spawn(|| cluster.run("alice", &script));
        let ended = wait_progress(cluster, name, 20).and_then(|_| {
            cluster
                .run("alice", &format!("kill $(cat {name}.pid)"))?
                .ok()
        });
        let first = first.join().map_err(|_| anyhow!("a thread panicked"))??;
        ended?;
        ensure!(first.status.code() == Some(128 + 15), "{first:?}");
        cluster.write("alice", format!("/home/alice/t/{name}.gate"), "")?;
        let second = cluster.run("alice", &command)?;
        ensure!(second.status.code() == Some(7), "{second:?}");
        let text = output(cluster, name)?;
        ensure!(text.matches("shell /bin/bash 7\n").count() == 1, "{text}");
        exact(&text)
    });
    explained(cluster, name, result)
}
