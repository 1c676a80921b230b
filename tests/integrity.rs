//! Damage to the generations of a real job (NumPy): found before anything is started, told, and met
//! by the next older good generation with the result of an uninterrupted run; where none is left,
//! the job fails, or begins anew if the site says so. A generation of another kind of node or
//! container image: refused before anything is started, and restarted if the user insists. And a
//! node that is lost: the job goes on on the other one.

mod support;

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use lab::Cluster;
use support::*;

const HEAT: &str = include_str!("programs/heat.py");

/// Some ten seconds of it.
const COMPUTE: &str = "python3 heat.py 6000 100 400";

#[test]
fn damage_is_found_and_met_by_an_older_generation() -> Result<()> {
    let cluster = cluster()?;
    cluster.write("alice", "/home/alice/heat.py", HEAT)?;
    let plain = format!("apptainer exec /images/python.sif {COMPUTE}");
    let expected = cluster.run_on("n1", "alice", &plain)?.ok()?;
    on_own_nodes(&cluster, |engine, node| {
        damage(&cluster, engine, node, &expected)
    })?;
    anew(&cluster, &expected)?;
    cluster.wait_nothing_left(LIMIT)
}

/// A test of each engine that is here at the same time, on a node of its own.
fn on_own_nodes(cluster: &Cluster, test: impl Fn(&str, &str) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let mut tests = Vec::new();
        for (engine, node) in [("dmtcp", "n1"), ("criu", "n2")] {
            if have(engine)? {
                let test = &test;
                tests.push(scope.spawn(move || explained(cluster, engine, test(engine, node))));
            }
        }
        for test in tests {
            test.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

fn damage_options(engine: &str, node: &str) -> Vec<String> {
    let mut options = options(engine, engine);
    options.extend([
        "--container-image=/images/python.sif".into(),
        "--container-checkpoint-signal=USR1".into(),
        format!("--nodelist={node}"),
    ]);
    options
}

/// A result of heat.py.
fn hash(text: &str) -> Option<&str> {
    text.lines().rfind(|line| line.starts_with("sha256"))
}

/// After [`damage`] has left no good generation, where the site wants such jobs to begin anew.
fn anew(cluster: &Cluster, expected: &str) -> Result<()> {
    cluster.write(
        "root",
        "/etc/slurm/container-checkpoint.yaml",
        "on_no_generation: fresh\n",
    )?;
    let mut jobs = Vec::new();
    for (engine, node) in [("dmtcp", "n1"), ("criu", "n2")] {
        if have(engine)? {
            let from = output(cluster, engine)?.len();
            let script = format!("#!/bin/bash\nexec {COMPUTE}\n");
            let job = sbatch(cluster, &damage_options(engine, node), &script)?;
            jobs.push((engine, from, job));
        }
    }
    for (engine, from, job) in jobs {
        let checked = || -> Result<()> {
            let end = cluster.wait_end(job, LIMIT)?;
            ensure!(end["JobState"] == "COMPLETED", "{end:?}");
            let text = output(cluster, engine)?;
            let new = text.get(from..).context("the output has shrunk")?;
            ensure!(new.contains(" starts under "), "it did not begin anew");
            ensure!(
                hash(new).is_some() && hash(new) == hash(expected),
                "another result"
            );
            Ok(())
        };
        explained(cluster, engine, checked())?;
    }
    Ok(())
}

fn damage(cluster: &Cluster, engine: &str, node: &str, expected: &str) -> Result<()> {
    let options = damage_options(engine, node);
    let script = format!("#!/bin/bash\nexec {COMPUTE}\n");
    let start = || sbatch(cluster, &options, &script);

    let job = start()?;
    for count in 1..=2 {
        let lines = output(cluster, engine)
            .unwrap_or_default()
            .matches("step ")
            .count();
        cluster.wait_file(format!("/home/alice/{engine}.out"), LIMIT, |text| {
            text.matches("step ").count() > lines
        })?;
        cluster
            .run("alice", &format!("scancel -b -s USR1 {job}"))?
            .ok()?;
        cluster.wait_file(format!("/home/alice/{engine}.out"), LIMIT, |text| {
            text.matches(" saved (").count() >= count
        })?;
    }
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    cluster.wait_end(job, LIMIT)?;

    // The newest: one bit of the largest file, in its middle.
    let newest = generations(cluster, engine)?
        .pop()
        .context("nothing was saved")?;
    let files = std::fs::read_dir(newest.join("rank-0"))?.flatten();
    let largest = files
        .max_by_key(|file| file.metadata().map_or(0, |about| about.len()))
        .context("an empty generation")?
        .path();
    flip(&largest)?;
    let job = start()?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    let text = output(cluster, engine)?;
    ensure!(text.contains(" is bad: "), "the flipped bit was not told");
    ensure!(text.contains(" goes on from generation "), "it began anew");
    ensure!(
        hash(&text).is_some() && hash(&text) == hash(expected),
        "another result"
    );

    // A second computation, of which every manifest is damaged.
    let job = start()?;
    let from = output(cluster, engine)?.len();
    cluster.wait_file(format!("/home/alice/{engine}.out"), LIMIT, |text| {
        text.get(from..).is_some_and(|new| new.contains("step "))
    })?;
    cluster
        .run("alice", &format!("scancel -b -s USR1 {job}"))?
        .ok()?;
    cluster.wait_file(format!("/home/alice/{engine}.out"), LIMIT, |text| {
        text.get(from..).is_some_and(|new| new.contains(" saved ("))
    })?;
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    cluster.wait_end(job, LIMIT)?;
    for generation in generations(cluster, engine)? {
        flip(&generation.join("manifest.json"))?;
    }
    let end = cluster.wait_end(start()?, LIMIT)?;
    ensure!(end["JobState"] == "FAILED", "{end:?}");
    let text = output(cluster, engine)?;
    ensure!(
        text.contains("no good generation is left"),
        "it was not told why"
    );
    Ok(())
}

#[test]
fn a_lost_node_costs_what_came_after_the_last_checkpoint() -> Result<()> {
    let engine = if have("dmtcp")? { "dmtcp" } else { "criu" };
    let mut spec = spec()?;
    // How soon Slurm takes a node that does not answer for lost, in seconds.
    spec.slurm_conf = "SlurmdTimeout=10\n".into();
    let cluster = with(&spec)?;
    cluster.write(
        "alice",
        "/home/alice/ledger.py",
        include_str!("programs/ledger.py"),
    )?;
    let mut options = options(engine, "lost");
    options.push("--container-image=/images/python.sif".into());
    options.push("--container-checkpoint-interval=2s".into());
    let script = "#!/bin/bash\nexec python3 ledger.py lost.ledger lost.gate\n";
    let job = sbatch(&cluster, &options, script)?;
    let test = || -> Result<()> {
        let first = node(&cluster, job)?;
        cluster.wait_file("/home/alice/lost.out", LIMIT, |text| {
            text.contains(" saved (")
        })?;
        wait_writing(&cluster, "lost")?;
        cluster.stop_node(&first)?;
        let saved = newest(&output(&cluster, "lost")?, ": generation ");
        let second = wait_run(&cluster, job, 1)?;
        ensure!(first != second, "it went on on the lost node");
        let text = cluster.wait_file("/home/alice/lost.out", LIMIT, |text| {
            text.contains(" goes on from generation ")
        })?;
        let from = newest(&text, " goes on from generation ");
        ensure!(from >= saved, "{saved:?} was saved, it is at {from:?}");
        cluster.write("alice", "/home/alice/lost.gate", "")?;
        let end = cluster.wait_end(job, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        exact(&std::fs::read_to_string(
            cluster.path("/home/alice/lost.ledger"),
        )?)
    };
    explained(&cluster, "lost", test())
}

#[test]
fn a_killed_slurmstepd_costs_what_came_after_the_last_checkpoint() -> Result<()> {
    let mut spec = spec()?;
    // How long Slurm believes that a batch step which a node does not know is yet to start.
    spec.slurm_conf = "BatchStartTimeout=1\n".into();
    let cluster = with(&spec)?;
    cluster.write(
        "alice",
        "/home/alice/ledger.py",
        include_str!("programs/ledger.py"),
    )?;
    let mut jobs = Vec::new();
    for (engine, node) in [("dmtcp", "n1"), ("criu", "n2")] {
        if have(engine)? {
            let mut options = options(engine, engine);
            options.extend([
                "--container-image=/images/python.sif".into(),
                "--container-checkpoint-interval=2s".into(),
                format!("--nodelist={node}"),
            ]);
            let script =
                format!("#!/bin/bash\nexec python3 ledger.py {engine}.ledger {engine}.gate\n");
            jobs.push((engine, node, sbatch(&cluster, &options, &script)?));
        }
    }
    for (engine, node, job) in jobs {
        explained(&cluster, engine, orphaned(&cluster, engine, node, job))?;
    }
    cluster.wait_nothing_left(LIMIT)
}

fn orphaned(cluster: &Cluster, engine: &str, node: &str, job: u32) -> Result<()> {
    let said = format!("/home/alice/{engine}.out");
    // Slurm believes in a batch step that is not there for 10 s more than BatchStartTimeout.
    cluster.wait_file(&said, LIMIT, |text| text.matches(" saved (").count() > 6)?;
    wait_writing(cluster, engine)?;
    // Both of the node's daemons, as when it runs out of memory; slurmd is started again.
    let kill = format!("kill -9 $(pgrep -x slurmd) $(pgrep -f '^slurmstepd: .{job}.batch')");
    cluster.run_on(node, "root", &kill)?.ok()?;
    let saved = newest(&output(cluster, engine)?, ": generation ");
    cluster.run_on(node, "root", "slurmd")?.ok()?;
    wait_run(cluster, job, 1)?;
    let text = cluster.wait_file(&said, LIMIT, |text| {
        text.contains(" goes on from generation ")
    })?;
    let from = newest(&text, " goes on from generation ");
    ensure!(from >= saved, "{saved:?} was saved, it is at {from:?}");
    cluster.write("alice", format!("/home/alice/{engine}.gate"), "")?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    exact(&std::fs::read_to_string(
        cluster.path(format!("/home/alice/{engine}.ledger")),
    )?)
}

/// Waits until a generation of a name is being written.
fn wait_writing(cluster: &Cluster, name: &str) -> Result<()> {
    let dir = cluster.path(format!(
        "/home/alice/.container-checkpoint/{name}/generations"
    ));
    let begun = std::time::Instant::now();
    loop {
        let names = std::fs::read_dir(&dir)?.flatten();
        if names
            .map(|entry| entry.path())
            .any(|path| path.extension().is_some_and(|end| end == "partial"))
        {
            return Ok(());
        }
        ensure!(begun.elapsed() < LIMIT, "no generation is written");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The number of the last generation that is named after `words`.
fn newest(text: &str, words: &str) -> Option<u64> {
    let number = |rest: &str| {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        rest[..end].parse().ok()
    };
    text.rsplit(words).find_map(number)
}

#[test]
fn another_kind_of_node_or_image_is_refused_unless_the_user_insists() -> Result<()> {
    let cluster = cluster()?;
    cluster.write(
        "alice",
        "/home/alice/ledger.py",
        include_str!("programs/ledger.py"),
    )?;
    on_own_nodes(&cluster, |engine, node| elsewhere(&cluster, engine, node))?;
    cluster.wait_nothing_left(LIMIT)
}

fn elsewhere(cluster: &Cluster, engine: &str, node: &str) -> Result<()> {
    let (ledger, gate) = (format!("{engine}.ledger"), format!("{engine}.gate"));
    let image = format!("/home/alice/{engine}.sif");
    cluster
        .run("alice", &format!("cp /images/python.sif {image}"))?
        .ok()?;
    let mut options = options(engine, engine);
    options.extend([
        format!("--container-image={image}"),
        "--container-checkpoint-signal=USR1".into(),
        format!("--nodelist={node}"),
    ]);
    let script = format!("#!/bin/bash\nexec python3 ledger.py {ledger} {gate}\n");
    let (said, ledger) = (
        format!("/home/alice/{engine}.out"),
        format!("/home/alice/{ledger}"),
    );

    let job = sbatch(cluster, &options, &script)?;
    cluster.wait_file(&ledger, LIMIT, |text| !text.is_empty())?;
    cluster
        .run("alice", &format!("scancel -b -s USR1 {job}"))?
        .ok()?;
    cluster.wait_file(&said, LIMIT, |text| text.contains(" saved ("))?;
    cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    cluster.wait_end(job, LIMIT)?;
    let generation = generations(cluster, engine)?
        .pop()
        .context("nothing was saved")?;
    let manifest = generation.join("manifest.json");
    let original = std::fs::read_to_string(&manifest)?;
    let written = std::fs::read_to_string(cluster.path(&ledger))?;

    let refused = |words: &[&str]| -> Result<()> {
        let from = output(cluster, engine)?.len();
        let end = cluster.wait_end(sbatch(cluster, &options, &script)?, LIMIT)?;
        ensure!(end["JobState"] == "FAILED", "{end:?}");
        let text = output(cluster, engine)?;
        let new = text.get(from..).context("the output has shrunk")?;
        println!("{engine}: {}", new.trim_end());
        for word in words {
            ensure!(new.contains(word), "{word:?} is not said");
        }
        ensure!(
            std::fs::read_to_string(cluster.path(&ledger))? == written,
            "the application has run"
        );
        Ok(())
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let other_kernel = |text: &str| {
        text.replacen(
            &format!("\"kernel\": \"{}\"", release.trim()),
            "\"kernel\": \"5.4.0-lab\"",
            1,
        )
    };
    let other_flags = |text: &str| {
        text.replacen(
            "\"cpu_flags\": [",
            "\"cpu_flags\": [\n    \"avx1024lab\",",
            1,
        )
    };
    if engine == "dmtcp" {
        checked(&manifest, &other_kernel(&original))?;
        refused(&[
            "the kernel differs: saved with 5.4.0-lab, here is",
            "--constraint",
        ])?;
    }
    checked(&manifest, &other_flags(&original))?;
    refused(&[
        "the processor differs: saved with avx1024lab",
        "--constraint",
    ])?;
    checked(&manifest, &original)?;

    // The time at which it was last changed, in its header: nothing that Apptainer looks at.
    let mut bytes = std::fs::read(cluster.path(&image))?;
    bytes[72] ^= 1;
    std::fs::write(cluster.path(&image), bytes)?;
    refused(&["the container image differs: saved with sif:", &image])?;

    // All at once.
    checked(&manifest, &other_flags(&other_kernel(&original)))?;
    options.push("--container-checkpoint-restart=force".into());
    let job = sbatch(cluster, &options, &script)?;
    cluster.wait_file(&said, LIMIT, |text| {
        text.contains("restarting in spite of this: ") && text.contains(" goes on from generation ")
    })?;
    cluster.write("alice", format!("/home/alice/{gate}"), "")?;
    let end = cluster.wait_end(job, LIMIT)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    exact(&std::fs::read_to_string(cluster.path(&ledger))?)
}

/// Writes a manifest with the check that belongs to it, as docs/on-disk-format.md has it.
fn checked(path: &std::path::Path, text: &str) -> Result<()> {
    const CHECK: std::ops::Range<usize> = 29..93;
    let mut text = text.to_owned();
    text.replace_range(CHECK, &"0".repeat(CHECK.len()));
    let check = blake3::hash(text.as_bytes()).to_hex();
    text.replace_range(CHECK, &check);
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

/// The committed generations of a name, oldest first.
fn generations(cluster: &Cluster, name: &str) -> Result<Vec<PathBuf>> {
    let dir = cluster.path(format!(
        "/home/alice/.container-checkpoint/{name}/generations"
    ));
    let mut found: Vec<PathBuf> = std::fs::read_dir(&dir)
        .with_context(|| dir.display().to_string())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    found.retain(|path| path.extension().is_none());
    found.sort();
    Ok(found)
}

/// Flips one bit in the middle of a file.
fn flip(path: &std::path::Path) -> Result<()> {
    let mut bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).with_context(|| path.display().to_string())
}

#[test]
fn a_store_that_is_full_or_fails_leaves_the_application_running() -> Result<()> {
    let cluster = cluster()?;
    cluster.write(
        "alice",
        "/home/alice/ledger.py",
        include_str!("programs/ledger.py"),
    )?;
    on_own_nodes(&cluster, |engine, node| {
        let fault = match engine {
            "dmtcp" => "begin-created:erofs:2",
            _ => "commit-files-synced:eio:2",
        };
        room(&cluster, engine, node, fault)
    })
}

/// `fault` fails the second checkpoint: no file system turns read-only while it is written to.
fn room(cluster: &Cluster, engine: &str, node: &str, fault: &str) -> Result<()> {
    let root =
        |script: &str| -> Result<()> { cluster.run_on(node, "root", script)?.ok().map(drop) };
    root("mount -t tmpfs -o size=512m,mode=700,uid=alice,gid=alice store /mnt")?;
    let mut options = options(engine, engine);
    options.extend([
        "--container-image=/images/python.sif".into(),
        "--container-checkpoint-signal=USR1".into(),
        "--container-checkpoint-dir=/mnt".into(),
        format!("--export=ALL,CONTAINER_CHECKPOINT_FAULT={fault}"),
        format!("--nodelist={node}"),
    ]);
    let script = format!("#!/bin/bash\nexec python3 ledger.py {engine}.ledger {engine}.gate\n");
    let job = sbatch(cluster, &options, &script)?;
    let file = format!("/home/alice/{engine}.out");
    let ledger = format!("/home/alice/{engine}.ledger");
    cluster.wait_file(&ledger, LIMIT, |text| !text.is_empty())?;
    // Asks for a checkpoint and waits for what became of it, and for progress after it.
    let save = || -> Result<bool> {
        let results = |text: &str| {
            text.matches(" saved (").count() + text.matches("the checkpoint failed").count()
        };
        let before = output(cluster, engine).unwrap_or_default();
        cluster
            .run("alice", &format!("scancel -b -s USR1 {job}"))?
            .ok()?;
        let text = cluster.wait_file(&file, LIMIT, |text| results(text) > results(&before))?;
        let lines = std::fs::read_to_string(cluster.path(&ledger))?.len();
        cluster.wait_file(&ledger, LIMIT, |text| text.len() > lines)?;
        Ok(text.matches(" saved (").count() > before.matches(" saved (").count())
    };
    let step = Step::submit(cluster, engine, node)?;
    ensure!(save()?, "no checkpoint where there is room");
    ensure!(!save()?, "a checkpoint in spite of {fault}");
    for left in ["0", "1", "2", "5", "11", "23"] {
        let fill = match left {
            // While the step's record grows.
            "0" => "! dd if=/dev/zero of=/mnt/fill bs=64k".to_owned(),
            _ => format!(
                "free=$(df --output=avail -k /mnt | tail -1); \
                 fallocate -l $((free - {left} * 1024))K /mnt/fill"
            ),
        };
        root(&fill)?;
        let saved = save()?;
        println!(
            "{engine}: {left} MiB left: {}",
            if saved { "saved" } else { "refused" }
        );
        ensure!(!saved || left != "0", "a checkpoint without any room");
        if left == "0" {
            step.wait_more(cluster)?;
        }
        root("rm /mnt/fill")?;
    }
    ensure!(save()?, "no checkpoint once there is room again");
    step.end(cluster)?;
    // How it ends counts, whatever can be written.
    root("! dd if=/dev/zero of=/mnt/fill bs=64k; ! dd if=/dev/zero of=/mnt/more bs=1")?;
    cluster.write("alice", format!("/home/alice/{engine}.gate"), "")?;
    let end = cluster.wait_end(job, LIMIT)?;
    let text = output(cluster, engine)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}: {text}");
    ensure!(text.contains("cannot be noted"), "{text}");
    exact(&std::fs::read_to_string(cluster.path(&ledger))?)
}

/// A step in a store that gets full, whose output is recorded there: 2 kB a line.
struct Step {
    name: String,
    job: u32,
}

impl Step {
    fn submit(cluster: &Cluster, engine: &str, node: &str) -> Result<Step> {
        let name = format!("{engine}-step");
        let mut options = options(engine, &name);
        options.extend([
            "--container-checkpoint-dir=/mnt".into(),
            format!("--nodelist={node}"),
        ]);
        let script = format!(
            "#!/bin/bash\nsrun --container-image=/images/python.sif python3 -uc '\
             import itertools, os, time\n\
             for n in itertools.count():\n  \
               print(n, \"x\" * 2000)\n  \
               time.sleep(0.005)\n  \
               if os.path.exists(\"{name}.gate\"): break\n\
             print(\"end\", n)'\n"
        );
        let job = sbatch(cluster, &options, &script)?;
        let step = Step { name, job };
        step.wait_more(cluster)?;
        Ok(step)
    }

    /// Waits for more lines than anything on their way could hold.
    fn wait_more(&self, cluster: &Cluster) -> Result<()> {
        let path = format!("/home/alice/{}.out", self.name);
        let lines = |text: &str| text.matches(" xxx").count();
        let before = std::fs::read_to_string(cluster.path(&path)).unwrap_or_default();
        let before = lines(&before);
        cluster
            .wait_file(&path, LIMIT, |text| lines(text) > before + 200)
            .map(drop)
    }

    /// Ends it: every line has to be there.
    fn end(self, cluster: &Cluster) -> Result<()> {
        open_gate(cluster, &self.name)?;
        let end = cluster.wait_end(self.job, LIMIT)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        let text = output(cluster, &self.name)?;
        let mut count = 0;
        for line in text.lines().filter(|line| line.contains(" xxx")) {
            ensure!(
                line.starts_with(&format!("{count} xxx")),
                "line {count}: {line}"
            );
            count += 1;
        }
        let last = format!("end {}", count - 1);
        ensure!(text.lines().any(|line| line == last), "no {last:?}");
        ensure!(text.contains("is not recorded any more"), "it was not told");
        Ok(())
    }
}
