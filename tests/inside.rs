//! What applications ask from inside their container: a checkpoint, the time left, a moment without
//! checkpoints, the values of this run. For both engines, in a batch script and in a step, and in an
//! image with nothing but busybox.

mod support;

use anyhow::{Context, Result, ensure};
use lab::Cluster;
use support::*;

#[test]
fn scripts_and_steps_ask_dmtcp() -> Result<()> {
    if !have("dmtcp")? {
        return Ok(());
    }
    let cluster = cluster()?;
    batch(&cluster, "dmtcp", "python.sif", "#!/bin/bash")?;
    step(&cluster, "dmtcp")
}

#[test]
fn scripts_and_steps_ask_criu() -> Result<()> {
    let cluster = cluster()?;
    batch(&cluster, "criu", "static.sif", "#!/bin/sh")?;
    step(&cluster, "criu")
}

/// Says what it sees, and lets itself be pre-empted in a section that it holds free of checkpoints.
/// `$1` is the checkpoint's name.
const SCRIPT: &str = r#"
ask=$CONTAINER_CHECKPOINT_CLIENT
now() { . "$CONTAINER_CHECKPOINT_ENVIRONMENT"; echo "$1 on $SLURMD_NODENAME in ${SLURM_RESTART_COUNT:-0}"; }
now begin
echo "asked: $("$ask" save --wait)"
echo "left: $("$ask" time-left) $(date +%s)"
"$ask" status | sed 's/time-left=[0-9]* //; s/^/status: /'
"$ask" release 2> "$1.none"; echo "nothing to release: $?"
echo "held: $("$ask" hold 25)"
echo "ready"
while [ ! -e "$1.go" ]; do sleep 0.2; done
ticket=$("$ask" save)
"$ask" status | sed 's/^/then status: /'
echo "still here"
"$ask" release
echo "then: $("$ask" result "$ticket" --wait)"
now end
"$ask" save > "$1.ticket"; echo "last: $?"
"#;

fn batch(cluster: &Cluster, engine: &str, image: &str, shell: &str) -> Result<()> {
    let name = format!("batch-{engine}");
    let mut options = options(engine, &name);
    options.extend([
        format!("--container-image=/images/{image}"),
        "--time=20".into(),
    ]);
    let script = format!("{shell}\nset -- {name}\n{SCRIPT}");
    let job = sbatch(cluster, &options, &script)?;
    explained(cluster, &name, asks(cluster, &name, job))
}

fn step(cluster: &Cluster, engine: &str) -> Result<()> {
    let name = format!("step-{engine}");
    cluster.write(
        "alice",
        "/home/alice/ask.sh",
        &format!("#!/bin/bash\n{SCRIPT}"),
    )?;
    let mut options = options(engine, &name);
    options.push("--time=20".into());
    let script =
        format!("#!/bin/bash\nsrun --container-image=/images/python.sif bash ask.sh {name}\n");
    let job = sbatch(cluster, &options, &script)?;
    explained(cluster, &name, asks(cluster, &name, job))
}

fn asks(cluster: &Cluster, name: &str, job: u32) -> Result<()> {
    let first = node(cluster, job)?;
    let out = format!("/home/alice/{name}.out");
    let line = |text: &str, start: &str| -> Result<String> {
        let found = text.lines().filter_map(|line| line.strip_prefix(start));
        let found: Vec<&str> = found.collect();
        ensure!(found.len() == 1, "`{start}` is there {} times", found.len());
        Ok(found[0].trim().to_owned())
    };
    let text = cluster.wait_file(&out, LIMIT, |text| {
        text.contains("\nready\n") || text.contains("container-checkpoint: error")
    })?;
    ensure!(
        line(&text, "begin ")? == format!("on {first} in 0"),
        "{text}"
    );
    ensure!(line(&text, "asked: ")? == "saved 1", "{text}");
    ensure!(line(&text, "nothing to release: ")? == "1", "{text}");
    ensure!(line(&text, "held: ")? == "1 25", "{text}");
    let status = "generation=1 restarted=none holds=0 held=0 waiting=no last=saved";
    ensure!(line(&text, "status: ")? == status, "{text}");

    // Seconds left and the time then make the end that Slurm has planned.
    let left = line(&text, "left: ")?;
    let numbers: Vec<i64> = left
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [left, then] = numbers[..] else {
        anyhow::bail!("left: {left}")
    };
    let end = cluster.job(job)?["EndTime"].clone();
    let end = cluster.run("alice", &format!("date -d {end} +%s"))?.ok()?;
    let end: i64 = end.trim().parse().with_context(|| end.clone())?;
    ensure!(
        (left + then - end).abs() <= 2,
        "{left} s left at {then}, the end is {end}"
    );

    // The pre-emption has to wait for the hold, and its checkpoint answers the ticket.
    let intruder = Intruder::on(cluster, &first)?;
    let waits = "the application holds checkpoints off";
    cluster.wait_file(&out, LIMIT, |text| text.contains(waits))?;
    cluster.write("alice", format!("/home/alice/{name}.go"), "")?;
    let second = wait_run(cluster, job, 1)?;
    intruder.leave(cluster)?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    let text = output(cluster, name)?;
    ensure!(text.matches("still here\n").count() == 1, "{text}");
    ensure!(
        text.contains("then status: generation=1 restarted=none time-left=")
            && text.contains(" holds=1 held=")
            && text.contains(" waiting=yes last=saved\n"),
        "{text}"
    );
    ensure!(line(&text, "then: ")? == "restarted 2", "{text}");
    ensure!(
        line(&text, "end ")? == format!("on {second} in 1"),
        "{text}"
    );
    ensure!(first != second, "it went on where it was");
    ensure!(line(&text, "last: ")? == "0", "{text}");
    cluster.wait_nothing_left(LIMIT)
}
