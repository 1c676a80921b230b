//! `container-checkpoint save`, asked from the login node of a job that runs elsewhere.

mod support;

use anyhow::{Result, ensure};
use support::*;

const STEP: &str = "#!/bin/bash\nsrun --container-image=/images/python.sif python3 lines.py lines.gate\necho after\n";

#[test]
fn a_running_step_is_saved_and_then_saved_and_ended() -> Result<()> {
    let cluster = cluster()?;
    let name = "lines";
    let first = sbatch(&cluster, &options("criu", name), STEP)?;
    let checked = || {
        wait_progress(&cluster, name, 20)?;
        let said = cluster
            .run("alice", "container-checkpoint save lines --wait")?
            .ok()?;
        ensure!(said.starts_with("lines/python3-"), "{said}");
        ensure!(said.contains(": saved as generation 1, "), "{said}");
        ensure!(said.ends_with(" MB\n"), "{said}");
        // What is in use is not meant by a sweep of everything.
        let pruned = cluster.run("alice", "container-checkpoint prune")?;
        ensure!(
            pruned.status.success() && pruned.stderr.is_empty(),
            "{pruned:?}"
        );
        wait_progress(&cluster, name, 20)?;
        let by_job = format!("container-checkpoint save {first} --stop --wait");
        let said = cluster.run("alice", &by_job)?.ok()?;
        ensure!(said.contains("saved as generation 2,"), "{said}");
        let end = cluster.wait_end(first, LIMIT)?;
        ensure!(end["JobState"] == "CANCELLED", "{end:?}");
        ensure!(
            !output(&cluster, name)?.contains("after\n"),
            "the script went on"
        );
        cluster.wait_nothing_left(LIMIT)?;

        let gone = cluster.run("alice", "container-checkpoint save lines --wait")?;
        ensure!(gone.status.code() == Some(3), "{gone:?}");
        let theirs = cluster.run("bob", "container-checkpoint save lines --wait")?;
        ensure!(theirs.status.code() == Some(3), "{theirs:?}");

        // Nothing of it can be saved.
        let script = "#!/bin/bash\necho begun\nuntil [ -e host.gate ]; do sleep 0.1; done\n";
        let host = sbatch(&cluster, &options("criu", "host"), script)?;
        cluster.wait_file("/home/alice/host.out", LIMIT, |text| text.contains("begun"))?;
        let said = cluster.run("alice", &format!("container-checkpoint save {host} --wait"))?;
        let told = said.stderr.contains("runs nothing that can be saved now");
        ensure!(said.status.code() == Some(1) && told, "{said:?}");
        open_gate(&cluster, "host")?;
        let end = cluster.wait_end(host, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");

        // An element of an array, by what squeue calls it; its name has the element's number.
        let mut more = options("criu", "element");
        more.push("--array=7".into());
        let array = sbatch(&cluster, &more, STEP)?;
        wait_progress(&cluster, "element", 5)?;
        let save = |element: &str| {
            let line = format!("container-checkpoint save {array}_{element} --stop --wait");
            cluster.run("alice", &line)
        };
        let (none, said) = (save("8")?, save("7")?.ok()?);
        ensure!(none.status.code() == Some(3), "{none:?}");
        ensure!(said.starts_with("element-7/python3-"), "{said}");
        cluster.wait_end(array, LIMIT)?;

        let second = sbatch(&cluster, &options("criu", name), STEP)?;
        wait_progress(&cluster, name, 20)?;
        open_gate(&cluster, name)?;
        let end = cluster.wait_end(second, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        exact(&output(&cluster, name)?)?;
        // What was deleted is told even where the next name is none.
        let deleted = cluster.run("alice", "container-checkpoint delete lines none")?;
        ensure!(deleted.status.code() == Some(3), "{deleted:?}");
        ensure!(deleted.stdout == "lines deleted\n", "{deleted:?}");
        // Every command means by a relative --dir the one it is in, and takes the option's patterns.
        let elsewhere = cluster.run(
            "alice",
            "container-checkpoint run --name here --dir sub -- true && container-checkpoint list \
             --dir '%h/sub' --json | grep -c '\"here\"'",
        )?;
        ensure!(
            elsewhere.status.success() && elsewhere.stdout == "1\n",
            "{elsewhere:?}"
        );
        Ok(())
    };
    explained(&cluster, name, checked())
}
