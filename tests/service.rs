//! Apptainer's own walk-through of checkpoints, done with ours: a service whose state is in memory is
//! saved, stopped, started again and asked, outside of Slurm and in a job, at a site that has
//! installed nothing: the helper is in the user's home directory.

mod support;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Cluster, Release, Spec};
use support::*;

const SERVER: &str = include_str!("programs/server.py");
const ASK: &str = include_str!("programs/ask.py");

/// How long a walk takes at most.
const WALKED: Duration = Duration::from_secs(60);

/// Apptainer's definition file, with our server.
const DEFINITION: &str = "Bootstrap: localimage
From: /images/python.sif

%files
    /home/alice/server.py /app/server.py

%startscript
    exec python3 /app/server.py \"$@\"
";

/// What Apptainer's documentation does by `checkpoint create`, `instance start --dmtcp-launch`,
/// `checkpoint instance`, `instance stop`, `instance start --dmtcp-restart` and `checkpoint delete`.
const WALK: &str = r#"
set -e
PATH=$HOME/bin:$PATH
ask() { python3 ask.py $PORT "$@"; }
serve() { container-checkpoint run "$@" --engine $ENGINE --startscript server.sif $PORT & }
container-checkpoint create $NAME
serve --name $NAME
ask; ask 1; ask
ask count; ask count
! container-checkpoint delete $NAME
container-checkpoint save $NAME --stop --wait
wait $! || echo "ended: $?"
serve --name $NAME
ask; ask count
container-checkpoint save $NAME --stop --wait
container-checkpoint pin $NAME@1
serve --from $NAME@1
ask count; ask 2
container-checkpoint save $NAME --stop --wait
serve --from $NAME@1 --name $NAME-copy
ask; ask count
container-checkpoint save $NAME-copy --stop --wait
serve --name $NAME
ask; ask count
container-checkpoint save $NAME --stop --wait
container-checkpoint delete --force $NAME $NAME-copy
! container-checkpoint list $NAME
"#;

/// A cluster of a site without the plugin, with what the walk needs.
fn plain(nodes: u32, release: Release) -> Result<Cluster> {
    let cluster = without_plugin(&Spec {
        release,
        nodes,
        cpus: 16,
        kill_wait_s: 20,
        ..Spec::default()
    })?;
    for (name, text) in [("server.py", SERVER), ("ask.py", ASK)] {
        cluster.write("alice", format!("/home/alice/{name}"), text)?;
    }
    cluster.write("alice", "/home/alice/server.def", DEFINITION)?;
    let built = cluster.run(
        "alice",
        "apptainer build --mksquashfs-args '-comp lz4' server.sif server.def",
    )?;
    built.ok().context("server.sif")?;
    Ok(cluster)
}

/// What the server and the commands say in [`WALK`], without the helper's own lines.
fn walked(name: &str) -> String {
    format!(
        "0\n1\n1\n1\n2\n{name}: saved as generation 1\nended: 143\n1\n3\n{name}: saved as generation 2\n\
         {name}@1 pinned\n3\n2\n{name}: saved as generation 4\n1\n3\n{name}-copy: saved as generation \
         2\n2\n4\n{name}: saved as generation 5\n{name} deleted\n{name}-copy deleted\n"
    )
}

/// Compares what a walk said with that.
fn compare(name: &str, said: &str) -> Result<()> {
    let mut text = String::new();
    for line in said.lines() {
        let line = line.split(", ").next().unwrap_or_default();
        let ours = line.starts_with("container-checkpoint:") || line.contains(" created in ");
        if !ours {
            text += line;
            text.push('\n');
        }
    }
    ensure!(text == walked(name), "{name}:\n{said}");
    ensure!(
        said.contains(&format!("checkpoint {name} is in use by")),
        "a running service could be deleted:\n{said}"
    );
    Ok(())
}

#[test]
fn services() -> Result<()> {
    let cluster = &plain(2, Release::Trixie)?;
    if have("dmtcp")? {
        walk(cluster, "dmtcp")?;
    }
    listening_under_criu(cluster)?;
    cluster.wait_nothing_left(Duration::from_secs(20))
}

/// Debian's next release has CRIU 4.2, which saves sockets that listen where the kernel lets it.
#[test]
fn services_under_criu() -> Result<()> {
    const NEEDED: (u32, u32) = (6, 16);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(str::parse);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        bail!("the kernel calls itself {release}");
    };
    if (major, minor) < NEEDED {
        eprintln!("SKIPPED: services under CRIU need Linux 6.16, this is {release}");
        return Ok(());
    }
    let cluster = &plain(2, Release::Sid)?;
    walk(cluster, "criu")?;
    cluster.wait_nothing_left(Duration::from_secs(20))
}

/// Walks outside of Slurm and in a job at once.
fn walk(cluster: &Cluster, engine: &str) -> Result<()> {
    let walk = format!("NAME=outside PORT=8888 ENGINE={engine}\n{WALK}");
    cluster.write("alice", "/home/alice/walk.sh", &walk)?;
    let script = format!("#!/bin/bash\nNAME=inside PORT=8889 ENGINE={engine}\n{WALK}");
    let options = ["--output=inside.out"];
    let job = cluster.sbatch("alice", &options, &script)?;
    let said = cluster.run("alice", "bash walk.sh 2>&1")?.ok()?;
    compare("outside", &said)?;
    let end = explained(cluster, "inside", cluster.wait_end(job, WALKED))?;
    let said = output(cluster, "inside")?;
    ensure!(end["ExitCode"] == "0:0", "{end:?}\n{said}");
    compare("inside", &said)?;
    ensure!(said.contains("this is a line of a batch script"), "{said}");
    Ok(())
}

/// CRIU before 4.2 does not save a socket that listens: the service is told and serves on.
fn listening_under_criu(cluster: &Cluster) -> Result<()> {
    let script = "PATH=$HOME/bin:$PATH
        container-checkpoint run --name listening --engine criu --startscript server.sif 8887 2>log &
        python3 ask.py 8887 count
        container-checkpoint save listening --wait && exit 9
        python3 ask.py 8887 count
        kill -9 $!
        cat log";
    let said = cluster.run("alice", script)?.ok()?;
    ensure!(said.starts_with("1\n2\n"), "{said}");
    ensure!(
        said.contains("the checkpoint failed, the application runs on"),
        "{said}"
    );
    Ok(())
}

// ------------------------------------------------------------------- what is written, and read

/// Reads a file line by line, slowly: the file is open all the time.
const READER: &str = r#"import sys, time
for number, line in enumerate(open(sys.argv[1])):
    print(number, flush=True)
    time.sleep(0.05)
"#;

/// A job of lines.py, and where it writes.
struct Lines {
    name: String,
    out: String,
    job: u32,
}

/// Submits lines.py as a user does whose site has installed nothing. How its output is opened:
/// `truncate`, as by default, or `append`; `step`: by srun, into a file of the task's own.
fn submit(cluster: &Cluster, engine: &str, mode: &str) -> Result<Lines> {
    let name = format!("{engine}-{mode}");
    let run = format!(
        "container-checkpoint run --name {name} --engine {engine} --interval 2s /images/python.sif \
         python3 lines.py {name}.gate"
    );
    let line = match mode {
        "step" => format!("srun --output={name}.%t.out {run}"),
        _ => format!("exec {run}"),
    };
    let script = format!("#!/bin/bash\nPATH=$HOME/bin:$PATH\n{line}\n");
    let open = if mode == "append" { mode } else { "truncate" };
    let options = [
        format!("--output={name}.out"),
        format!("--open-mode={open}"),
        format!("--job-name={name}"),
    ];
    let out = if mode == "step" {
        format!("{name}.0")
    } else {
        name.clone()
    };
    let job = sbatch(cluster, &options, &script)?;
    Ok(Lines { name, out, job })
}

/// All are pre-empted, and then their node is lost without a warning. Nothing is missing in their
/// output, and nothing that was written after the last checkpoint is there twice. Who had a file open
/// that only that node has is told.
#[test]
fn output_is_exact_after_a_loss() -> Result<()> {
    let cluster = &plain(2, Release::Trixie)?;
    cluster.write("alice", "/home/alice/reader.py", READER)?;
    let mut all = Vec::new();
    for engine in ["criu", "dmtcp"] {
        if !have(engine)? {
            continue;
        }
        for mode in ["truncate", "append", "step"] {
            all.push(submit(cluster, engine, mode)?);
        }
    }
    let each = |what: &dyn Fn(&Lines) -> Result<()>| -> Result<()> {
        all.iter()
            .try_for_each(|lines| explained(cluster, &lines.out, what(lines)))
    };
    each(&|lines| {
        ensure!(node(cluster, lines.job)? == "n1", "it is not on n1");
        wait_progress(cluster, &lines.out, 20).map(drop)
    })?;
    let intruder = Intruder::on(cluster, "n1")?;
    each(&|lines| {
        ensure!(wait_run(cluster, lines.job, 1)? == "n2", "it is not on n2");
        Ok(())
    })?;
    intruder.leave(cluster)?;
    cluster
        .run_on("n2", "alice", "seq 100000 >/tmp/data")?
        .ok()?;
    let reader = sbatch(
        cluster,
        &["--output=reader.out", "--open-mode=append", "--nodelist=n2"].map(String::from),
        "#!/bin/bash\nPATH=$HOME/bin:$PATH\nexec container-checkpoint run --name reader --interval 2s \
         /images/python.sif python3 reader.py /tmp/data\n",
    )?;
    // Each is saved in this run, and writes more.
    let saved = |out: &str, begins: &str| {
        cluster.wait_file(format!("/home/alice/{out}.out"), LIMIT, |text| {
            let of_run = text.rsplit_once(begins).map_or("", |(_, of_run)| of_run);
            let after = of_run
                .split_once("interval)")
                .map_or("", |(_, after)| after);
            !numbers(after).is_empty()
        })
    };
    each(&|lines| saved(&lines.out, " goes on from generation ").map(drop))?;
    saved("reader", " starts under ")?;
    cluster.stop_node("n2")?;
    let down = "scontrol update nodename=n2 state=down reason=lost; \
                scontrol update jobid=";
    cluster
        .run("root", &format!("{down}{reader} reqnodelist=n1"))?
        .ok()?;
    each(&|lines| {
        ensure!(wait_run(cluster, lines.job, 2)? == "n1", "it is not on n1");
        open_gate(cluster, &lines.name)?;
        let end = cluster.wait_end(lines.job, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        let text = output(cluster, &lines.out)?;
        // Of what Slurm has emptied, no more may be kept than what was saved.
        let cut = text.contains("after the saved state are cut off");
        ensure!(
            cut || !lines.name.ends_with("append"),
            "nothing was cut off"
        );
        ensure!(
            text.matches(" goes on from generation ").count() == 2,
            "what the helper said is missing:\n{text}"
        );
        exact(&text)
    })?;
    let end = explained(cluster, "reader", cluster.wait_end(reader, LIMIT))?;
    let text = output(cluster, "reader")?;
    ensure!(end["ExitCode"] == "1:0", "{end:?}\n{text}");
    ensure!(
        text.contains("/tmp/data cannot be found") && text.contains("every node has for itself"),
        "{text}"
    );
    Ok(())
}
