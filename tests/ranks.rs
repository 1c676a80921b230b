//! Steps of several ranks under DMTCP: on one node and over two, each rank with its own exit code.

mod support;

use anyhow::{Result, ensure};
use support::*;

/// Every rank counts to its own file until the gate is there; rank N ends with code N.
const RANK: &str = r#"
import os, sys, time
gate, rank = sys.argv[1], os.environ["SLURM_PROCID"]
number, left = 0, 20
with open("rank-%s.lines" % rank, "w") as out:
    while left > 0:
        print(number, file=out, flush=True)
        number += 1
        time.sleep(0.02)
        if left < 20 or os.path.exists(gate):
            left -= 1
    print("end", number, file=out, flush=True)
sys.exit(int(rank))
"#;

#[test]
fn ranks_of_one_node_are_saved_together() -> Result<()> {
    ranks("one-node", &["--nodes=1", "--ntasks=2"], true)
}

#[test]
fn ranks_of_two_nodes_are_saved_together() -> Result<()> {
    ranks(
        "two-nodes",
        &["--nodes=2", "--ntasks-per-node=1", "--ntasks=2"],
        false,
    )
}

#[test]
fn criu_refuses_ranks_that_it_cannot_save_together() -> Result<()> {
    let cluster = cluster()?;
    let mut options = options("criu", "many");
    options.extend(["--nodes=1".to_owned(), "--ntasks=2".into()]);
    let script = "#!/bin/sh\nsrun --container-image=/images/python.sif python3 -c 'pass'\n";
    let job = sbatch(&cluster, &options, script)?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "FAILED", "{end:?}");
    let text = output(&cluster, "many")?;
    ensure!(
        text.contains("CRIU saves each process tree by itself"),
        "{text}"
    );
    cluster.wait_nothing_left(LIMIT)
}

fn ranks(name: &str, shape: &[&str], exclusive: bool) -> Result<()> {
    if !have("dmtcp")? {
        return Ok(());
    }
    let cluster = cluster()?;
    cluster.write("alice", "/home/alice/rank.py", RANK)?;
    let mut options = options("dmtcp", name);
    options.extend(shape.iter().map(ToString::to_string));
    let script = format!(
        "#!/bin/bash\nsrun --container-image=/images/python.sif python3 rank.py {name}.gate\n\
         echo \"after: $?\"\n"
    );
    let job = sbatch(&cluster, &options, &script)?;
    explained(
        &cluster,
        name,
        (|| {
            let lines = |rank: u32, count: usize| {
                let path = format!("/home/alice/rank-{rank}.lines");
                cluster.wait_file(&path, LIMIT, |text| text.lines().count() >= count)
            };
            let first = node(&cluster, job)?;
            for rank in 0..2 {
                lines(rank, 10)?;
            }
            let on = if exclusive { first.as_str() } else { "n1" };
            let intruder = Intruder::on(&cluster, on)?;
            if !exclusive {
                // Both nodes are needed: it can only go on when they are free again.
                cluster.wait_job(job, LIMIT, |job| {
                    job["JobState"] == "PENDING" && job["Restarts"] == "1"
                })?;
                intruder.leave(&cluster)?;
                wait_run(&cluster, job, 1)?;
            } else {
                wait_run(&cluster, job, 1)?;
                intruder.leave(&cluster)?;
            }
            let now = lines(0, 0)?.lines().count();
            lines(0, now + 10)?;
            open_gate(&cluster, name)?;
            let end = cluster.wait_end(job, LIMIT)?;
            ensure!(end["JobState"] == "COMPLETED", "{end:?}");
            let text = output(&cluster, name)?;
            ensure!(
                text.contains("after: 1\n"),
                "the largest code of the ranks is 1:\n{text}"
            );
            for rank in 0..2 {
                let text = lines(rank, 1)?;
                let numbers = numbers(&text);
                ensure!(
                    numbers.iter().copied().eq(0..numbers.len() as u64),
                    "rank {rank}:\n{text}"
                );
                ensure!(
                    text.ends_with(&format!("end {}\n", numbers.len())),
                    "rank {rank}:\n{text}"
                );
            }
            cluster.wait_nothing_left(LIMIT)
        })(),
    )
}
