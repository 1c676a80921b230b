//! Batch scripts as people have them, each pre-empted at a telling point: what the script and its
//! containers have written in the end is what an uninterrupted run writes, and no container that had
//! completed or was saved has been started twice.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use lab::{Cluster, Job, Spec};
use support::*;

/// For what takes some seconds on an idle machine.
const WAIT: Duration = Duration::from_secs(60);

const STAGE: &str = include_str!("programs/stage.py");

/// What ends the first run of a job.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// Of all jobs on n1 at once.
    Preemption,
    TimeLimit,
    /// After `container-checkpoint save`.
    Requeue,
    /// Nothing: it is saved, and runs on.
    Nobody,
    /// The loss of its node, after it was saved and has gone on.
    Loss,
}

struct Case {
    name: &'static str,
    engine: &'static str,
    /// More options of sbatch.
    options: &'static [&'static str],
    script: &'static str,
    /// Whether the job has `--container-checkpoint`.
    option: bool,
    /// Where the job waits: GATE.reached says so, and GATE.open lets it go on.
    gates: &'static [&'static str],
    by: By,
    /// How the job ends: Slurm's `ExitCode`.
    exit_code: &'static str,
}

/// Lines that keep what they start under names of their own, in the foreground and background.
const RUNS: &str = "run() { container-checkpoint run --name $1-$SLURM_JOB_ID $SIF python3 stage.py $*; }\n\
                    run first > out1\n\
                    run back gate1 > out2 &\n\
                    run front gate2 | tail -n 5 > out3\n\
                    wait\n\
                    run last\n";

const CASES: &[Case] = &[
    Case {
        name: "runs",
        engine: "dmtcp",
        script: RUNS,
        gates: &["gate1", "gate2"],
        ..DEFAULT
    },
    Case {
        name: "runs-limited",
        engine: "criu",
        options: &["--time=1", "--nodelist=n3"],
        script: RUNS,
        gates: &["gate1", "gate2"],
        by: By::TimeLimit,
        ..DEFAULT
    },
    Case {
        name: "runs-asked",
        engine: "criu",
        options: &["--nodelist=n3"],
        script: RUNS,
        gates: &["gate1", "gate2"],
        by: By::Requeue,
        ..DEFAULT
    },
    Case {
        name: "limited",
        engine: "criu",
        options: &["--time=1", "--nodelist=n3"],
        script: "apptainer exec $SIF python3 stage.py a gate | \
                   apptainer exec $SIF python3 stage.py b- > out\n\
                 apptainer exec $SIF python3 stage.py c\n",
        gates: &["gate"],
        by: By::TimeLimit,
        ..DEFAULT
    },
    Case {
        name: "asked",
        engine: "dmtcp",
        options: &["--nodelist=n3"],
        script: "apptainer exec $SIF python3 stage.py a gate1 > out &\n\
                 apptainer exec $SIF python3 stage.py b gate2 | cat > out2\n\
                 wait\n",
        gates: &["gate1", "gate2"],
        by: By::Requeue,
        ..DEFAULT
    },
    Case {
        name: "plain",
        engine: "dmtcp",
        script: "apptainer exec $SIF python3 stage.py one\n\
                 echo host one $?\n\
                 apptainer exec --cleanenv $SIF python3 stage.py two gate 7\n\
                 echo host two $?\n\
                 apptainer exec $SIF python3 stage.py three\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "steps",
        engine: "criu",
        script: "srun --container-image=$SIF python3 stage.py one\n\
                 echo host one $?\n\
                 srun $HOME/my.sif stage.py two gate 7\n\
                 echo host two $?\n\
                 apptainer exec $SIF python3 stage.py three\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "step-reads",
        engine: "dmtcp",
        // What is given before the gate is read in the first run, and given again in the second.
        script: "(seq 12; until [ -e gate.open ]; do sleep 0.1; done; seq 13 30) | \
                   srun apptainer exec $SIF python3 stage.py a- gate > out\n\
                 srun --container-image=$SIF python3 stage.py b- <<END\n\
                 one\ntwo\nEND\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "step-reads-file",
        engine: "criu",
        script: "seq 30 > list\n\
                 srun apptainer exec $SIF python3 stage.py a- gate < list | tee copy | tail -n 5 > out\n\
                 (seq 12; until [ -e gate.open ]; do sleep 0.1; done; seq 13 30) | \
                   srun --container-image=$SIF python3 stage.py b-\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "step-writes",
        engine: "criu",
        script: "srun apptainer exec $SIF python3 stage.py one > one\n\
                 srun --output=two apptainer exec $SIF python3 stage.py two\n\
                 srun -o three -e errors apptainer exec $SIF python3 stage.py three gate\n\
                 srun --container-image=$SIF python3 stage.py four >> three\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "step-pipes",
        engine: "dmtcp",
        script: "srun --overlap apptainer exec $SIF python3 stage.py a | tee copy | \
                   srun --overlap apptainer exec $SIF python3 stage.py b- gate | tail -n 5 > out\n\
                 srun apptainer exec $SIF python3 stage.py c > out2\n\
                 echo host ${PIPESTATUS[*]} > status\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "step-without-option",
        engine: "criu",
        option: false,
        options: &["--open-mode=truncate"],
        script: "seq 30 | srun container-checkpoint run --engine=criu --name plain-$SLURM_JOB_ID \
                   $SIF python3 stage.py a- gate\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "descriptors",
        engine: "dmtcp",
        // What is open for writing is not where a step writes; what goes nowhere stays there.
        script: "exec 9> lock\n\
                 srun apptainer exec $SIF python3 stage.py one\n\
                 srun --output=none apptainer exec $SIF python3 stage.py two\n\
                 srun apptainer exec $SIF python3 stage.py three gate > out\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "tasks",
        engine: "dmtcp",
        options: &["--ntasks=2"],
        // Steps whose output nobody carries.
        script: "run=\"apptainer exec $SIF python3 stage.py\"\n\
                 mkdir -p logs\n\
                 srun -n2 $run one > logs/one; sort logs/one > one\n\
                 srun -n2 $run two > logs/two; sort logs/two > two; rm logs/two two.starts\n\
                 srun -n2 $run three | sort > three; rm three.starts\n\
                 (echo head; srun -n1 -u $run four; srun -n1 -u $run five) > four\n\
                 srun -n1 -u --open-mode=truncate -o six -e none $run six\n\
                 srun -n1 -u $run seven gate > seven\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "loop",
        engine: "dmtcp",
        script: "for n in 1 2 3; do\n\
                   [ $n = 2 ] && gate=gate || gate=\n\
                   apptainer exec $SIF python3 stage.py $n $gate > out.$n\n\
                   apptainer exec $SIF python3 stage.py more$n >> out.all\n\
                 done\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "same",
        engine: "criu",
        script: "rm -f out\n\
                 for n in 1 2 3; do\n\
                   [ $n != 2 ] && touch gate || rm gate\n\
                   apptainer exec $SIF python3 stage.py same gate >> out\n\
                 done\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "read-loop",
        engine: "criu",
        script: "printf 'a\\nb\\nc\\n' > list\n\
                 while read n; do\n\
                   echo host $n\n\
                   apptainer exec $SIF python3 stage.py $n gate\n\
                 done < list\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "pipe",
        engine: "dmtcp",
        script: "apptainer exec $SIF python3 stage.py a | tee copy | \
                   apptainer exec $SIF python3 stage.py b- gate | tail -n 5 > out\n\
                 echo host ${PIPESTATUS[*]} > status\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "producer",
        engine: "criu",
        script: "set -o pipefail\n\
                 apptainer exec $SIF python3 stage.py a gate 2>&1 | \
                   apptainer exec $SIF python3 stage.py b- > out 2> errors\n\
                 apptainer exec $SIF python3 stage.py c- < out > out2\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "substitution",
        engine: "dmtcp",
        script: "one=$(apptainer exec $SIF python3 stage.py one)\n\
                 two=$(apptainer exec $SIF python3 stage.py two gate 2>&1)\n\
                 echo \"$one\" | wc -l > out\n\
                 echo \"$two\" >> out\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "modules",
        engine: "dmtcp",
        script: "mkdir -p tool/bin apptainer/bin\n\
                 PATH=$PWD/tool/bin:$PATH\n\
                 apptainer exec $SIF python3 stage.py one > one\n\
                 printf '#!/bin/sh\\necho called >> called\\nexec /usr/bin/apptainer \"$@\"\\n' \
                   > apptainer/bin/apptainer\n\
                 chmod +x apptainer/bin/apptainer\n\
                 export PATH=${CONTAINER_CHECKPOINT_STAGES:-}:$PWD/apptainer/bin:$PATH\n\
                 apptainer exec $SIF python3 stage.py two gate > two\n\
                 apptainer --version > version\n\
                 [ -s called ] && rm called\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "here-document",
        engine: "dmtcp",
        script: "seq 100 > list\n\
                 apptainer exec $SIF python3 stage.py a- gate <<END > out\n\
                 $(cat list)\n\
                 END\n\
                 apptainer exec $SIF python3 stage.py b- < list > out2\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "singularity",
        engine: "criu",
        script: "singularity -q exec -B /tmp $SIF python3 stage.py one gate\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "runscript",
        engine: "dmtcp",
        script: "apptainer run $HOME/app one\n\
                 apptainer run $HOME/app two gate 7 > out\n\
                 echo host $?\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "shell",
        engine: "dmtcp",
        // The rest of the script is read after the pre-emption.
        script: "srun apptainer shell -B /tmp $SIF <<'END' > out\n\
                 n=1 TOP=$PWD\n\
                 cd /\n\
                 (cd $TOP && python3 stage.py one gate)\n\
                 echo $((n + 1)) $SHELL $?\n\
                 read line; echo \"not: $line\"\n\
                 a line that is read\n\
                 exit 7\n\
                 END\n\
                 echo host $?\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "shell-script",
        engine: "criu",
        script: "cat > script.sh <<'END'\n\
                 python3 stage.py one gate\n\
                 cat <<EOF\n\
                 $0 $SHELL\n\
                 EOF\n\
                 END\n\
                 apptainer shell --shell /bin/sh $SIF < script.sh\n\
                 env X=1 $HOME/my.sif -c 'import os; print(os.environ[\"X\"])' > out\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "settings",
        engine: "criu",
        // What is skipped would lack one.starts; --no-mount=proc cannot be held.
        script: "export CONTAINER_CHECKPOINT_CONFIG=$HOME/settings.yaml\n\
                 rm -f one.starts\n\
                 apptainer exec $SIF python3 stage.py one > one\n\
                 [ -s raw ] || apptainer exec --no-mount=proc $SIF python3 stage.py raw > raw\n\
                 apptainer exec $SIF python3 stage.py two gate > two\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "two-images",
        engine: "auto",
        script: "apptainer exec /images/static.sif cat stage.py | head -n 1 > out\n\
                 apptainer exec $SIF python3 stage.py one gate | \
                   apptainer exec /images/openmp.sif cat >> out\n",
        gates: &["gate"],
        ..DEFAULT
    },
    Case {
        name: "failing",
        engine: "dmtcp",
        script: "set -e\n\
                 apptainer exec $SIF python3 stage.py one || true\n\
                 apptainer exec $SIF python3 stage.py two gate 3\n\
                 echo host never\n",
        gates: &["gate"],
        exit_code: "3:0",
        ..DEFAULT
    },
    Case {
        name: "background",
        engine: "dmtcp",
        script: "for seed in 1 2; do\n\
                   SEED=$seed apptainer exec $SIF python3 stage.py sim gate$seed > out.$seed &\n\
                 done\n\
                 wait\n\
                 cat out.1 out.2 > out\n",
        gates: &["gate1", "gate2"],
        ..DEFAULT
    },
    Case {
        name: "array",
        engine: "criu",
        options: &["--array=1-2"],
        script: "t=$SLURM_ARRAY_TASK_ID\n\
                 apptainer exec $SIF python3 stage.py one$t > out.$t\n\
                 apptainer exec $SIF python3 stage.py two$t gate$t >> out.$t\n",
        gates: &["gate1", "gate2"],
        ..DEFAULT
    },
    Case {
        name: "het",
        engine: "dmtcp",
        // Slurm would not start a requeued one before something else happens (see several.rs).
        options: &["--nodelist=n3", ":", "--nodelist=n4"],
        by: By::Nobody,
        script: "apptainer exec $SIF python3 stage.py one\n\
                 srun --het-group=1 hostname > hosts && rm hosts\n\
                 apptainer exec $SIF python3 stage.py two gate > out\n",
        gates: &["gate"],
        ..DEFAULT
    },
];

/// What is written after the checkpoint and before the node is lost is written once in the end.
const LOSSES: &[Case] = &[
    Case {
        name: "lost-step",
        engine: "dmtcp",
        script: "srun apptainer exec $SIF python3 stage.py zero\n\
                 echo host next\n\
                 srun apptainer exec $SIF python3 stage.py one gate1,gate2\n",
        ..LOST
    },
    Case {
        name: "lost-step-emptied",
        engine: "criu",
        options: &["--open-mode=truncate"],
        script: "srun apptainer exec $SIF python3 stage.py zero\n\
                 srun apptainer exec $SIF python3 stage.py one gate1,gate2\n",
        ..LOST
    },
    Case {
        name: "lost-stage",
        engine: "dmtcp",
        script: "apptainer exec $SIF python3 stage.py zero\n\
                 apptainer exec $SIF python3 stage.py one gate1,gate2\n",
        ..LOST
    },
    Case {
        name: "lost-files",
        engine: "criu",
        script: "step() { srun --overlap \"$@\"; }\n\
                 step --output=one --open-mode=append apptainer exec $SIF python3 stage.py one gate1,gate2 &\n\
                 step --output=two apptainer exec $SIF python3 stage.py two gate1,gate2 &\n\
                 step apptainer exec $SIF python3 stage.py three gate1,gate2 > three &\n\
                 apptainer exec $SIF python3 stage.py four gate1,gate2 >> four &\n\
                 apptainer exec $SIF python3 stage.py five gate1,gate2 | tail -n 7 > five &\n\
                 wait\n",
        ..LOST
    },
];

const LOST: Case = Case {
    gates: &["gate1", "gate2"],
    by: By::Loss,
    ..DEFAULT
};

const DEFAULT: Case = Case {
    name: "",
    engine: "",
    options: &[],
    script: "",
    option: true,
    gates: &[],
    by: By::Preemption,
    exit_code: "0:0",
};

#[test]
fn scripts_are_preempted_and_end_as_if_they_had_not_been() -> Result<()> {
    let cluster = &with(&Spec {
        nodes: 4,
        cpus: 48,
        kill_wait_s: 90,
        ..spec()?
    })?;
    let make = "apptainer --silent build --sandbox app /images/python.sif && cd app && \
                printf '#!/bin/sh\\nexec python3 stage.py \"$@\"\\n' > .singularity.d/runscript && \
                chmod 755 .singularity.d/runscript";
    cluster.run("alice", make)?.ok()?;
    // An image that is run as a program.
    let program = "apptainer --silent build --mksquashfs-args '-comp lz4' my.sif my.def";
    let definition = "Bootstrap: localimage\nFrom: /images/python.sif\n\
                      %runscript\nexec python3 \"$@\"\n";
    cluster.write("alice", "/home/alice/my.def", definition)?;
    cluster.run("alice", program)?.ok()?;
    let settings = "completed_stages: rerun\non_unavailable: run\n";
    cluster.write("alice", "/home/alice/settings.yaml", settings)?;
    let mut cases = Vec::new();
    for case in CASES {
        if have(case.engine)? {
            cases.push(case);
        }
    }
    // One that is not interrupted, without the option, beside each.
    let mut jobs = Vec::new();
    for case in &cases {
        let reference = submit(cluster, case, false)?;
        jobs.push((*case, reference, submit(cluster, case, true)?));
    }
    for (case, reference, _) in &jobs {
        let end = cluster.wait_end(*reference, WAIT)?;
        ensure!(end["ExitCode"] == case.exit_code, "{}: {end:?}", case.name);
    }
    for (case, _, job) in &jobs {
        for gate in case.gates {
            reached(cluster, case, *job, gate)?;
        }
        let node = node(cluster, *job)?;
        let begins = case.by != By::Preemption || node == "n1";
        ensure!(begins, "{} began on {node}", case.name);
    }
    let intruder = Intruder::on(cluster, "n1")?;
    let mut failed = Vec::new();
    for (case, _, job) in &jobs {
        if let Err(why) = goes_on(cluster, case, *job) {
            failed.push(format!("{}: {}", case.name, said(cluster, case, &why)));
        }
    }
    intruder.leave(cluster)?;
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    cluster.wait_nothing_left(WAIT)
}

#[test]
fn what_was_written_before_a_node_was_lost_is_not_there_twice() -> Result<()> {
    let cluster = &with(&Spec {
        cpus: 48,
        // How soon Slurm takes a node that does not answer for lost, in seconds.
        slurm_conf: "SlurmdTimeout=10\n".into(),
        ..spec()?
    })?;
    let mut jobs = Vec::new();
    for case in LOSSES {
        if have(case.engine)? {
            let reference = submit(cluster, case, false)?;
            jobs.push((case, reference, submit(cluster, case, true)?));
        }
    }
    for (case, reference, job) in &jobs {
        cluster.wait_end(*reference, WAIT)?;
        reached(cluster, case, *job, "gate1")?;
        let save = format!("container-checkpoint save {job} --wait");
        cluster.run("alice", &save)?.ok()?;
        let gate = format!("{}/gate1.open", place(case, true));
        cluster.write("alice", gate, "")?;
        reached(cluster, case, *job, "gate2")?;
        let written = place(case, true)
            + if case.name == "lost-files" {
                "/one"
            } else {
                "/job.out"
            };
        cluster.wait_file(&written, WAIT, |text| text.contains("one 14 "))?;
    }
    cluster.stop_node("n1")?;
    let mut failed = Vec::new();
    for (case, _, job) in &jobs {
        cluster.wait_job(*job, WAIT, |job| job["JobState"] == "PENDING")?;
        let anywhere = format!("scontrol update JobId={job} ExcNodeList=");
        cluster.run("root", &anywhere)?.ok()?;
        if let Err(why) = goes_on(cluster, case, *job) {
            failed.push(format!("{}: {}", case.name, said(cluster, case, &why)));
        }
        // Else it was right because the same was written again.
        let all = said(cluster, case, &anyhow!("it was not told what was cut off"));
        if case.name != "lost-step-emptied" && !all.contains("are cut off") {
            failed.push(format!("{}: {all}", case.name));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

fn place(case: &Case, interrupted: bool) -> String {
    let kind = if interrupted { "run" } else { "reference" };
    format!("/home/alice/{}.{kind}", case.name)
}

fn submit(cluster: &Cluster, case: &Case, interrupted: bool) -> Result<u32> {
    let place = place(case, interrupted);
    cluster.run("alice", &format!("mkdir {place}"))?.ok()?;
    cluster.write("alice", format!("{place}/stage.py"), STAGE)?;
    let mut options = vec![
        format!("--job-name={}", case.name),
        format!("--chdir={place}"),
        "--output=job.out".into(),
        "--error=job.err".into(),
        "--open-mode=append".into(),
    ];
    if interrupted {
        // Those that are pre-empted stand together on n1, and go on on n2.
        match case.by {
            By::Preemption => options.push("--exclude=n3,n4".into()),
            By::Loss => options.push("--exclude=n2".into()),
            _ => {}
        }
        if case.option {
            options.push(format!("--container-checkpoint={}-%A-%a", case.name));
            options.push(format!("--container-checkpoint-engine={}", case.engine));
        }
    } else {
        // Else n1 might be full, or n2 look better, when those come that are to begin on n1.
        options.push(match case.by {
            By::Loss => "--exclude=n1".into(),
            _ => "--exclude=n1,n2".into(),
        });
        for gate in case.gates {
            cluster.write("alice", format!("{place}/{gate}.open"), "")?;
        }
    }
    options.extend(case.options.iter().map(ToString::to_string));
    let mut script = case.script.to_owned();
    if !interrupted {
        script = script.replace("srun --container-image=$SIF", "srun apptainer exec $SIF");
    }
    let script = format!("#!/bin/bash\nSIF=/images/python.sif\n{script}");
    sbatch(cluster, &options, &script)
}

/// Waits until a job has come to a gate.
fn reached(cluster: &Cluster, case: &Case, job: u32, gate: &str) -> Result<()> {
    let path = cluster.path(format!("{}/{gate}.reached", place(case, true)));
    let over = |job: &Job| !["PENDING", "RUNNING"].contains(&job["JobState"].as_str());
    cluster.wait_job(job, WAIT, |job| path.exists() || over(job))?;
    let why = anyhow!("{gate} was not reached");
    ensure!(
        path.exists(),
        "{}: {}",
        case.name,
        said(cluster, case, &why)
    );
    Ok(())
}

fn goes_on(cluster: &Cluster, case: &Case, job: u32) -> Result<()> {
    if matches!(case.by, By::Requeue | By::Nobody) {
        let save = format!("container-checkpoint save {job} --wait");
        let said = cluster.run("alice", &save)?.ok()?;
        let saved = said.matches("saved as generation 1").count();
        ensure!(saved == case.gates.len(), "{said}");
    }
    if case.by == By::Requeue {
        let requeue = cluster.run("alice", &format!("scontrol requeue {job}"))?;
        requeue.ok()?;
    }
    if case.by != By::Nobody {
        cluster.wait_job(job, 2 * WAIT, |job| {
            // With a time limit it may be the second or third by now.
            job["JobState"] == "RUNNING" && job["Restarts"] != "0"
        })?;
    }
    for gate in case.gates {
        cluster.write("alice", format!("{}/{gate}.open", place(case, true)), "")?;
    }
    let end = cluster.wait_end(job, WAIT)?;
    ensure!(end["ExitCode"] == case.exit_code, "{end:?}");
    let (expected, got) = (files(cluster, case, false)?, files(cluster, case, true)?);
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(&expected) == names(&got),
        "the files {:?} instead of {:?}",
        names(&got),
        names(&expected)
    );
    for (name, text) in &expected {
        let got = &got[name];
        if name == "job.out" {
            // The script's own lines come again from its beginning, as ever after a requeue.
            let own = |text: &str, is: bool| -> Vec<String> {
                let lines = text.lines().filter(|line| line.starts_with("host ") == is);
                lines.map(ToOwned::to_owned).collect()
            };
            ensure!(own(got, false) == own(text, false), "{name}: {got}");
            let (script, last) = (own(text, true), own(got, true));
            ensure!(last.ends_with(&script), "{name}: {got}");
            continue;
        }
        ensure!(got == text, "{name} is\n{got}instead of\n{text}");
    }
    Ok(())
}

/// The contents of all files that a run has left, but what the helper said.
fn files(cluster: &Cluster, case: &Case, interrupted: bool) -> Result<BTreeMap<String, String>> {
    let place = cluster.path(place(case, interrupted));
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&place)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_file() && name != "job.err" {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            // What Slurm and the helper say of a step goes to where that writes its errors.
            let own = |line: &&str| {
                !["container-checkpoint: ", "slurmstepd", "srun: "]
                    .iter()
                    .any(|begin| line.starts_with(begin))
            };
            files.insert(name, text.split_inclusive('\n').filter(own).collect());
        }
    }
    Ok(files)
}

fn said(cluster: &Cluster, case: &Case, why: &anyhow::Error) -> String {
    let read = |name: &str| {
        let path = Path::new(&place(case, true)).join(name);
        fs::read_to_string(cluster.path(path)).unwrap_or_default()
    };
    format!(
        "{why:#}\nwhat the job said:\n{}\n{}",
        read("job.out"),
        read("job.err")
    )
}
