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
container-checkpoint list
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
    let built = cluster.run("alice", "apptainer build server.sif server.def")?;
    built.ok().context("server.sif")?;
    Ok(cluster)
}

#[test]
fn services() -> Result<()> {
    let cluster = &plain(2)?;
    if have("dmtcp")? {
        let begun = std::time::Instant::now();
        let walk = format!("NAME=outside PORT=8888\n{WALK}");
        let said = cluster.run("alice", &walk)?;
        println!("{said:?} {:?}", begun.elapsed());
    }
    Ok(())
}
