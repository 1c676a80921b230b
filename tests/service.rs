//! Apptainer's own walk-through of checkpoints, done with ours: a service whose state is in memory is
//! saved, stopped, started again and asked, outside of Slurm and in a job, at a site that has
//! installed nothing: the helper is in the user's home directory.

mod support;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Spec};
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
serve() { container-checkpoint run "$@" --engine dmtcp --startscript server.sif $PORT & }
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

/// A cluster of a site without the plugin, and alice's own copy of the helper.
fn plain(nodes: u32) -> Result<Cluster> {
    let cluster = with(&Spec {
        nodes,
        cpus: 8,
        kill_wait_s: 20,
        ..Spec::default()
    })?;
    for (name, text) in [("server.py", SERVER), ("ask.py", ASK)] {
        cluster.write("alice", format!("/home/alice/{name}"), text)?;
    }
    cluster.write("alice", "/home/alice/server.def", DEFINITION)?;
    let bin = cluster.path("/home/alice/bin");
    cluster.run("alice", "mkdir bin")?.ok()?;
    let helper = bin.join("container-checkpoint");
    std::fs::copy(built("container-checkpoint")?, &helper).context("the helper")?;
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
    let cluster = &plain(2)?;
    if have("dmtcp")? {
        let walk = format!("NAME=outside PORT=8888\n{WALK}");
        cluster.write("alice", "/home/alice/walk.sh", &walk)?;
        let script = format!("#!/bin/bash\nNAME=inside PORT=8889\n{WALK}");
        let options = ["--output=inside.out"];
        let job = cluster.sbatch("alice", &options, &script)?;
        let said = cluster.run("alice", "bash walk.sh 2>&1")?.ok()?;
        compare("outside", &said)?;
        let end = explained(cluster, "inside", cluster.wait_end(job, WALKED))?;
        let said = output(cluster, "inside")?;
        ensure!(end["ExitCode"] == "0:0", "{end:?}\n{said}");
        compare("inside", &said)?;
    }
    listening_under_criu(cluster)?;
    cluster.wait_nothing_left(Duration::from_secs(20))
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
