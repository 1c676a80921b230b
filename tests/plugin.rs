//! The plugin alone, in Slurm 22.05, 24.11 and 26.05: the same library file in all of them. In the
//! helper's place stands a script that says what it was given and runs the task.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab::{Cluster, File, Output, Release, Spec};
use support::built;

const HELPER: &str = r#"#!/bin/sh
if [ -n "$CONTAINER_CHECKPOINT_ARGV0" ]; then
    echo "helper: by argv[0]"
    set -- "$CONTAINER_CHECKPOINT_ARGV0" "$@"
    unset CONTAINER_CHECKPOINT_ARGV0
elif [ "$1 $2" = "task --" ]; then
    echo "helper: by task --"
    shift 2
fi
printf 'helper: %s: %s\n' "$#" "$*"
env | grep ^CONTAINER_CHECKPOINT | sort | sed 's/^/helper: /'
exec "$@"
"#;

/// For a job to start and end on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

const NAME_RULE: &str = "a checkpoint name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and does \
not start with a dot; %j %A %a %x %u stand for job id, array job id, array task id, job name and \
user, %% is not allowed";

#[test]
fn the_library_needs_only_libc_and_exports_only_what_slurm_calls() -> Result<()> {
    let library = built("libcontainer_checkpoint.so")?;
    let output = |program: &str, options: &[&str]| -> Result<String> {
        let output = Command::new(program).args(options).arg(&library).output()?;
        ensure!(output.status.success(), "{program}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    for line in output("readelf", &["-d", "-W"])?
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
    {
        ensure!(
            line.contains("[libc.so.6]") || line.contains("[ld-linux"),
            "{line}"
        );
    }
    let table = output("nm", &["-D", "--defined-only"])?;
    let mut exported: Vec<&str> = table
        .lines()
        .filter_map(|l| l.split(' ').next_back())
        .collect();
    exported.sort_unstable();
    ensure!(
        exported
            == [
                "plugin_name",
                "plugin_type",
                "plugin_version",
                "slurm_spank_init",
                "slurm_spank_init_failure_mode",
                "slurm_spank_init_post_opt",
                "slurm_spank_task_init",
            ],
        "{table}"
    );
    Ok(())
}

#[test]
fn slurm_22_05() -> Result<()> {
    all(Release::OldSlurm)
}

#[test]
fn slurm_24_11() -> Result<()> {
    all(Release::Trixie)
}

#[test]
fn slurm_26_05() -> Result<()> {
    all(Release::Sid)
}

type Scenario = fn(&Site) -> Result<()>;

/// Everything on one cluster; what failed is told at the end.
fn all(release: Release) -> Result<()> {
    let file = |path: &str, contents: Vec<u8>| File {
        path: path.into(),
        contents,
        mode: 0o755,
    };
    let version = match release {
        Release::OldSlurm => 0x16_0500,
        Release::Trixie => 0x18_0b00,
        Release::Sid => 0x1a_0500,
    };
    let library = built("libcontainer_checkpoint.so")?;
    let plugins = "/usr/lib/x86_64-linux-gnu/slurm-wlm";
    let site = Site {
        cluster: Cluster::start(&Spec {
            release,
            nodes: 1,
            cpus: 4,
            plugin: Some(library.clone()),
            images: false,
            dmtcp: false,
            files: vec![
                file("/usr/bin/container-checkpoint", HELPER.into()),
                file("/opt/helper", HELPER.into()),
                file(&format!("{plugins}/other.so"), other_plugin(version)?),
                file(&format!("{plugins}/spank_pyxis.so"), other_plugin(version)?),
                file(
                    &format!("{plugins}/panicking.so"),
                    fs::read(built("libpanicking_plugin.so")?)?,
                ),
            ],
            slurm_conf: "LaunchParameters=use_interactive_step\n\
                         InteractiveStepOptions=\"--interactive --preserve-env $SHELL\"\n\
                         PrologFlags=Alloc,Contain\n"
                .to_owned(),
            ..Spec::default()
        })?,
        way: match release {
            Release::OldSlurm => "by argv[0]",
            Release::Trixie | Release::Sid => "by task --",
        },
    };
    let scenarios: &[(&str, Scenario)] = &[
        ("options are in --help", in_help),
        ("bad values are refused at submission", bad_values),
        ("srun", srun),
        ("sbatch and its steps", sbatch),
        ("sbatch --export=NONE", export_none),
        ("salloc and its steps", salloc),
        ("the environment form", environment_form),
        ("other jobs inherit nothing", nested),
        ("srun --multi-prog", multi_prog),
        ("a job without the option is untouched", untouched),
        ("words of plugstack.conf", words),
        ("a helper that is missing", missing_helper),
        ("another plugin with --container-image", other_image),
        ("a panic in any callback", panics),
    ];
    let mut failed = Vec::new();
    for (name, scenario) in scenarios {
        site.stack(&["optional container_checkpoint.so"])?;
        let started = Instant::now();
        if let Err(error) = scenario(&site) {
            failed.push(format!("{name}: {error:#}"));
        }
        println!(
            "{release:?}: {name}: {:.1} s",
            started.elapsed().as_secs_f32()
        );
    }
    // Not drained, above all.
    let last = "timeout 30 sh -c 'until sinfo -h -o %T | grep -qx idle; do sleep 0.2; done'; \
                sinfo -h -o %T";
    let state = site.run(last)?.stdout;
    if state != "idle\n" {
        failed.push(format!("after all the node is {state}, not idle"));
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

fn in_help(site: &Site) -> Result<()> {
    for command in ["sbatch", "srun", "salloc"] {
        let help = site.run(&format!("{command} --help"))?.ok()?;
        for option in [
            "--container-checkpoint=NAME ",
            "--container-image=IMAGE ",
            "--container-checkpoint-engine=ENGINE",
            "--container-checkpoint-restart=WHEN",
            "--container-checkpoint-dir=PATH",
            "--container-checkpoint-interval=INTERVAL",
            "--container-checkpoint-signal=SIGNAL",
            "--container-checkpoint-placement=PLACEMENT",
        ] {
            let first = |line: &&str| format!("{} ", line.trim_start()).starts_with(option);
            ensure!(
                help.lines().filter(first).count() == 1,
                "{command}: {option}: {help}"
            );
        }
    }
    Ok(())
}

fn bad_values(site: &Site) -> Result<()> {
    site.write("job.sh", "#!/bin/sh\ntrue\n")?;
    for (option, value, rule) in [
        ("container-checkpoint", "my job", NAME_RULE),
        ("container-checkpoint", "../x", NAME_RULE),
        ("container-checkpoint", "", NAME_RULE),
        (
            "container-checkpoint-engine",
            "blcr",
            "the engine is auto, dmtcp or criu",
        ),
        (
            "container-checkpoint-placement",
            "inside",
            "the placement is auto, injected (the node's DMTCP, ",
        ),
        (
            "container-checkpoint-restart",
            "maybe",
            "what to do with a saved state is auto ",
        ),
        (
            "container-checkpoint-dir",
            "here",
            "the directory that holds the checkpoints is an abso",
        ),
        (
            "container-checkpoint-interval",
            "often",
            "the interval between checkpoints is off, auto",
        ),
        (
            "container-checkpoint-signal",
            "TERM",
            "the signal that requests a checkpoint is one of ",
        ),
        (
            "container-image",
            "docker://x",
            "the container image is the path of a SIF file or of a ",
        ),
    ] {
        for command in ["sbatch", "srun", "salloc"] {
            let ran = site.run(&format!("{command} '--{option}={value}' ./job.sh"))?;
            let sentence = format!(
                "{command}: error: container-checkpoint: --{option}={value} is not possible: {rule}"
            );
            ensure!(ran.stderr.contains(&sentence), "no {sentence:?} in {ran:?}");
            // What Slurm itself exits with for a bad value of its own.
            ensure!(ran.status.code() == Some(255), "{ran:?}");
        }
    }
    for command in ["sbatch", "srun", "salloc"] {
        let ran = site.run(&format!("{command} --container-image=/x.sif ./job.sh"))?;
        let sentence = format!(
            "{command}: error: container-checkpoint: --container-image is possible only together \
             with --container-checkpoint=NAME"
        );
        ensure!(
            ran.stderr.contains(&sentence) && ran.status.code() == Some(1),
            "{ran:?}"
        );
    }
    ensure!(
        site.run("squeue -h")?.ok()?.is_empty(),
        "something was submitted"
    );
    Ok(())
}

fn srun(site: &Site) -> Result<()> {
    // What is left of another task is replaced or removed.
    let line = "CONTAINER_CHECKPOINT_IMAGE=/left/over CONTAINER_CHECKPOINT=old \
                srun --container-checkpoint=%x-1 --container-checkpoint-dir=/scratch/%u \
                --container-checkpoint-signal=usr1 printf '%s\\n' 'a b' c";
    let stdout = site.run(line)?.ok()?;
    site.is_wrapped(
        &stdout,
        "4: printf %s\\n a b c",
        &["=%x-1", "_DIR=/scratch/%u", "_SIGNAL=usr1", "_STEP=step"],
    )?;
    ensure!(stdout.ends_with("a b\nc\n"), "{stdout}");

    let line = "srun --container-checkpoint=n sh -c 'kill -9 $$'";
    ensure!(site.run(line)?.status.code() == Some(128 + 9));
    ensure!(
        site.run("srun --container-checkpoint=n sh -c 'exit 7'")?
            .status
            .code()
            == Some(7)
    );
    Ok(())
}

fn sbatch(site: &Site) -> Result<()> {
    site.write(
        "job.sh",
        "#!/bin/sh\n\
         #SBATCH --container-checkpoint=lines --container-checkpoint-engine=criu\n\
         #SBATCH --container-image=/a,b:c.sif\n\
         echo \"script: $*\"\nsrun echo inner\nsrun --container-checkpoint=own echo inner\n",
    )?;
    let stdout = site.batch("--container-checkpoint-restart=fresh job.sh x y")?;
    let (batch, steps) = stdout.split_once("script: x y\n").context(stdout.clone())?;
    let options = ["_ENGINE=criu", "_IMAGE=/a,b:c.sif", "_RESTART=fresh"];
    let with = |first: &'static str, last: &'static str| {
        let mut all = vec![first];
        all.extend(options);
        all.push(last);
        all
    };
    ensure!(batch.contains("/slurm_script x y\n"), "{batch}");
    site.is_wrapped(batch, "3: /", &with("=lines", "_STEP=batch"))?;
    let (first, second) = steps.split_once("\ninner\n").context(stdout.clone())?;
    site.is_wrapped(first, "2: echo inner", &with("=lines", "_STEP=step"))?;
    site.is_wrapped(second, "2: echo inner", &with("=own", "_STEP=step"))?;

    // The command line wins over the script's lines.
    let stdout = site.batch("--container-checkpoint=line job.sh")?;
    ensure!(
        stdout.contains("helper: CONTAINER_CHECKPOINT=line\n"),
        "{stdout}"
    );
    ensure!(!stdout.contains("CONTAINER_CHECKPOINT=lines\n"), "{stdout}");
    Ok(())
}

fn export_none(site: &Site) -> Result<()> {
    site.write(
        "job.sh",
        "#!/bin/sh\necho \"script: $*\"\nsrun /bin/echo inner\n",
    )?;
    let stdout = site.batch(
        "--export=NONE --container-checkpoint=none --container-checkpoint-interval=1h job.sh x",
    )?;
    let (batch, step) = stdout.split_once("script: x\n").context(stdout.clone())?;
    site.is_wrapped(batch, "2: /", &["=none", "_INTERVAL=1h", "_STEP=batch"])?;
    site.is_wrapped(
        step,
        "2: /bin/echo inner",
        &["=none", "_INTERVAL=1h", "_STEP=step"],
    )
}

fn salloc(site: &Site) -> Result<()> {
    let stdout = site
        .run("salloc -Q --container-checkpoint=sa sh -c 'echo shell; srun echo inner'")?
        .ok()?;
    let step = stdout.strip_prefix("shell\n").context(stdout.clone())?;
    site.is_wrapped(step, "2: echo inner", &["=sa", "_STEP=step"])?;

    // The shell that salloc starts on the node is not for saving.
    let interactive = "printf 'echo shell; env | grep ^CONTAINER_CH\\nsrun echo \
                       inner\\n' | CONTAINER_CHECKPOINT=left CONTAINER_CHECKPOINT_STEP=step \
                       SHELL=/bin/sh salloc -Q --container-checkpoint=sa";
    let stdout = site.run(interactive)?.ok()?;
    let step = stdout.strip_prefix("shell\n").context(stdout.clone())?;
    site.is_wrapped(step, "2: echo inner", &["=sa", "_STEP=step"])
}

fn environment_form(site: &Site) -> Result<()> {
    let form = "SLURM_SPANK__SLURM_SPANK_OPTION_container_checkpoint_container_checkpoint";
    let stdout = site.run(&format!("{form}=form srun echo x"))?.ok()?;
    site.is_wrapped(&stdout, "2: echo x", &["=form", "_STEP=step"])?;
    site.write("job.sh", "#!/bin/sh\n")?;
    let stdout = site.batch_with(&format!("{form}=form"), "job.sh")?;
    site.is_wrapped(&stdout, "1: /", &["=form", "_STEP=batch"])?;
    let ran = site.run(&format!("{form}=.bad sbatch job.sh"))?;
    ensure!(
        ran.status.code() == Some(1) && ran.stderr.contains(NAME_RULE),
        "{ran:?}"
    );
    Ok(())
}

fn nested(site: &Site) -> Result<()> {
    site.write(
        "other.sh",
        "#!/bin/sh\nenv | grep -E '^(SLURM_SPANK|CONTAINER_CHECKPOINT)'\nsrun echo other\n",
    )?;
    site.write(
        "job.sh",
        "#!/bin/sh\nsbatch --parsable -o other.txt $1 other.sh\n",
    )?;
    let other = |stdout: &str| -> Result<String> {
        let id = stdout.lines().last().unwrap_or_default();
        site.cluster
            .wait_end(id.parse().context(stdout.to_owned())?, LIMIT)?;
        site.read("other.txt")
    };
    let stdout = site.batch("--container-checkpoint=outer job.sh")?;
    ensure!(
        stdout.contains("helper: CONTAINER_CHECKPOINT=outer"),
        "{stdout}"
    );
    let found = other(&stdout)?;
    ensure!(found == "other\n", "in sbatch: {found}");
    let found = other(
        &site
            .run("salloc -Q --container-checkpoint=outer sh job.sh")?
            .ok()?,
    )?;
    ensure!(found == "other\n", "in salloc: {found}");

    // But what the other job asks for stays, and so does what the user has set.
    let stdout = site.batch("--container-checkpoint=outer job.sh --container-checkpoint=second")?;
    let found = other(&stdout)?;
    ensure!(
        found
            .matches("helper: CONTAINER_CHECKPOINT=second\n")
            .count()
            == 2,
        "{found}"
    );
    let line = "CONTAINER_CHECKPOINT_ENGINE=criu srun env | grep ^CONTAINER_CH";
    ensure!(
        site.run(line)?.ok()? == "CONTAINER_CHECKPOINT_ENGINE=criu\n",
        "a user's own"
    );

    // A step that was rid of the option on purpose is rid of the rest of it.
    site.write(
        "job.sh",
        "#!/bin/sh\nenv -u $1 srun env | grep ^CONTAINER_CH\ntrue\n",
    )?;
    let form = "SLURM_SPANK__SLURM_SPANK_OPTION_container_checkpoint_container_checkpoint";
    let stdout = site.batch(&format!("--container-checkpoint=outer job.sh {form}"))?;
    ensure!(stdout.ends_with("_STEP=batch\n"), "{stdout}");
    Ok(())
}

fn multi_prog(site: &Site) -> Result<()> {
    site.write("programs", "0-1 echo task %t\n")?;
    let ran = site.run("srun -n2 --multi-prog --container-checkpoint=n programs")?;
    if site.way == "by argv[0]" {
        ensure!(
            ran.stderr
                .contains("srun --multi-prog can be made resumable from Slurm 23.11")
        );
        ensure!(
            ran.status.code() == Some(1) && ran.stdout.is_empty(),
            "{ran:?}"
        );
    } else {
        let stdout = ran.ok()?;
        ensure!(stdout.contains("helper: 3: echo task 0\n"), "{stdout}");
        ensure!(stdout.contains("helper: 3: echo task 1\n"), "{stdout}");
    }
    Ok(())
}

fn untouched(site: &Site) -> Result<()> {
    site.write(
        "job.sh",
        "#!/bin/sh\nenv\necho \"argv=$(tr '\\0' ' ' </proc/$$/cmdline)\"\n\
         echo \"parent=$(cat /proc/$PPID/comm)\"\ngrep ^Sig /proc/self/status | tr ':' '='\n\
         echo limits=$(ulimit -a | cksum)\nls -l /proc/self/fd | wc -l | sed 's/^/files=/'\n",
    )?;
    let look = || -> Result<[_; 2]> {
        Ok([
            facts(&site.run("srun ./job.sh a b")?.ok()?),
            facts(&site.batch("job.sh a b")?),
        ])
    };
    let with = look()?;
    site.stack(&[])?;
    let without = look()?;
    for (with, without) in with.iter().zip(&without) {
        ensure!(with.len() > 20, "{with:#?}");
        let different: Vec<_> = with.symmetric_difference(without).collect();
        ensure!(different.is_empty(), "on one side only: {different:?}");
    }
    Ok(())
}

/// A task's environment and the rest, without what differs from job to job.
fn facts(text: &str) -> BTreeSet<String> {
    let of_one_job = |key: &str| {
        let job = [
            "SLURM_JOB_ID",
            "SLURM_JOBID",
            "SLURM_JOB_SLUID",
            "SLURM_TASK_PID",
            "SigQ",
        ];
        job.contains(&key) || key.ends_with("_PORT") || key.ends_with("_TIME")
    };
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines
        .map(|(key, value)| {
            let value = if of_one_job(key) { "" } else { value };
            // The spool directory of a batch script has the job's number in it.
            let kept = value.split("/job0").next().unwrap_or_default();
            format!("{key}={kept}")
        })
        .collect()
}

fn words(site: &Site) -> Result<()> {
    site.write("job.sh", "#!/bin/sh\necho ran\n")?;
    let line = "container_checkpoint.so helper=/opt/helper config=/etc/cc.yaml image-option=box";
    site.stack(&[&format!("optional {line}")])?;
    let stdout = site
        .run("srun --container-checkpoint=n --box=/i.sif echo x")?
        .ok()?;
    let variables = ["=n", "_CONFIG=/etc/cc.yaml", "_IMAGE=/i.sif", "_STEP=step"];
    site.is_wrapped(&stdout, "2: echo x", &variables)?;
    let ran = site.run("srun --container-image=/x echo x")?;
    ensure!(
        ran.stderr
            .contains("unrecognized option '--container-image=/x'"),
        "{ran:?}"
    );
    let ran = site.run("srun --container-checkpoint=n --box=docker://x echo x")?;
    ensure!(
        ran.stderr.contains(": --box=docker://x is not possible: "),
        "{ran:?}"
    );

    let sentence = "container-checkpoint: plugstack.conf: unknown word colour=red behind the \
                    plugin's path: allowed are helper=PATH and config=PATH";
    for (kind, others_run) in [("optional", true), ("required", false)] {
        site.stack(&[&format!("{kind} container_checkpoint.so colour=red")])?;
        for command in ["srun", "sbatch"] {
            let ran = site.run(&format!("{command} --container-checkpoint=n ./job.sh"))?;
            ensure!(
                !ran.status.success() && ran.stderr.contains(sentence),
                "{kind}: {ran:?}"
            );
            let ran = site.run(&format!("{command} ./job.sh"))?;
            ensure!(ran.status.success() == others_run, "{kind}: {ran:?}");
            ensure!(ran.stderr.contains(sentence), "{kind}: {ran:?}");
        }
    }
    // Where only the node has the bad word: those who asked are told, the others and the node are
    // not concerned.
    for kind in ["optional", "required"] {
        site.stack(&["optional container_checkpoint.so"])?;
        let plain = site.run("sbatch -H --parsable -o plain.txt job.sh")?.ok()?;
        let asked = "sbatch -H --parsable -o asked.txt --container-checkpoint=n job.sh";
        let asked = site.run(asked)?.ok()?;
        site.stack(&[&format!("{kind} container_checkpoint.so colour=red")])?;
        site.run(&format!(
            "scontrol release {} {}",
            plain.trim(),
            asked.trim()
        ))?
        .ok()?;
        for (id, file, code, text) in [
            (&plain, "plain.txt", "0:0", "ran\n"),
            (&asked, "asked.txt", "1:0", sentence),
        ] {
            let job = site.cluster.wait_end(id.trim().parse()?, LIMIT)?;
            let output = site.read(file)?;
            ensure!(
                job["ExitCode"] == code && output.contains(text),
                "{kind}: {job:?}: {output}"
            );
            ensure!(!(file == "plain.txt" && output != text), "{kind}: {output}");
        }
    }
    Ok(())
}

fn missing_helper(site: &Site) -> Result<()> {
    site.stack(&["optional container_checkpoint.so helper=/opt/none"])?;
    let ran = site.run("srun --container-checkpoint=n echo ran")?;
    let sentence = "container-checkpoint: the helper /opt/none cannot be run on this node: No such \
                    file or directory";
    ensure!(
        ran.stderr.contains(sentence) && ran.status.code() == Some(1),
        "{ran:?}"
    );
    ensure!(ran.stdout.is_empty(), "{ran:?}");
    ensure!(site.run("srun echo ran")?.ok()? == "ran\n");
    Ok(())
}

fn other_image(site: &Site) -> Result<()> {
    let owned = "srun: other: /i.sif";
    // Pyxis keeps the option wherever it stands, another plugin where it stands first.
    let pyxis = [
        "optional container_checkpoint.so",
        "optional spank_pyxis.so",
    ];
    let first = ["optional other.so", "optional container_checkpoint.so"];
    for (stack, lines_about_it) in [(pyxis, 0), (first, 1)] {
        site.stack(&stack)?;
        let ran = site.run("srun --container-image=/i.sif echo x")?;
        ensure!(ran.stderr.contains(owned) && ran.stdout == "x\n", "{ran:?}");
        let about = ran
            .stderr
            .matches("option \"container-image\" provided by both")
            .count();
        ensure!(about == lines_about_it, "{ran:?}");
        let stdout = site.run("srun --container-checkpoint=n echo x")?.ok()?;
        site.is_wrapped(&stdout, "2: echo x", &["=n", "_STEP=step"])?;
        let ran = site.run("srun --container-checkpoint=n --container-image=/i.sif echo x")?;
        let sentence = "container-checkpoint: --container-image is another plugin's here";
        ensure!(
            ran.stderr.contains(sentence) && ran.status.code() == Some(1),
            "{ran:?}"
        );
    }
    site.stack(&[
        "optional other.so",
        "optional container_checkpoint.so image-option=box",
    ])?;
    let ran = site.run("srun --container-checkpoint=n --box=/b.sif echo x")?;
    ensure!(!ran.stderr.contains("provided by both"), "{ran:?}");
    site.is_wrapped(
        &ran.ok()?,
        "2: echo x",
        &["=n", "_IMAGE=/b.sif", "_STEP=step"],
    )
}

fn panics(site: &Site) -> Result<()> {
    site.write("job.sh", "#!/bin/sh\necho ran\n")?;
    for callback in ["init", "option", "init_post_opt", "task_init"] {
        for kind in ["optional", "required"] {
            site.stack(&[&format!("{kind} panicking.so panic={callback}")])?;
            let mut told = String::new();
            // A job that did not ask runs.
            let ran = site.run("srun ./job.sh")?;
            ensure!(
                ran.status.success() && ran.stdout == "ran\n",
                "{callback}: {ran:?}"
            );
            told += &ran.stderr;
            // The batch step is where a required plugin could drain the node.
            if kind == "required" && callback != "option" {
                let output = site.batch("job.sh")?;
                ensure!(output.ends_with("ran\n"), "{callback}: {output}");
            }
            // One that asked runs wrapped or not at all.
            let ran = site.run("srun --container-checkpoint=n ./job.sh")?;
            let wrapped = ran.stdout.starts_with("helper: ") && ran.status.success();
            ensure!(
                wrapped || ran.stdout.is_empty() && !ran.status.success(),
                "{ran:?}"
            );
            told += &ran.stderr;
            let sentence = format!("fault point {callback}");
            ensure!(
                told.contains("internal error, please report it: "),
                "{callback}: {told}"
            );
            ensure!(told.contains(&sentence), "{callback}: {told}");
        }
    }
    Ok(())
}

/// A cluster with one node, and how a task is wrapped on it.
struct Site {
    cluster: Cluster,
    way: &'static str,
}

impl Site {
    fn run(&self, line: &str) -> Result<Output> {
        self.cluster
            .run("alice", line)
            .with_context(|| line.to_owned())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        self.cluster
            .write("alice", format!("/home/alice/{name}"), text)
    }

    fn read(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(
            self.cluster.path(format!("/home/alice/{name}")),
        )?)
    }

    /// The output of a batch job, which has to succeed.
    fn batch(&self, arguments: &str) -> Result<String> {
        self.batch_with("", arguments)
    }

    fn batch_with(&self, variables: &str, arguments: &str) -> Result<String> {
        let line = format!("{variables} sbatch --parsable -o out-%j.txt {arguments}");
        let id = self.run(&line)?.ok().with_context(|| line.clone())?;
        let job = self
            .cluster
            .wait_end(id.trim().parse().context(id.clone())?, LIMIT)?;
        let output = self.read(&format!("out-{}.txt", id.trim()))?;
        ensure!(job["JobState"] == "COMPLETED", "{line}: {job:?}: {output}");
        Ok(output)
    }

    /// Replaces the lines of plugstack.conf.
    fn stack(&self, lines: &[&str]) -> Result<()> {
        let path = "/etc/slurm/plugstack.conf.d/container-checkpoint.conf";
        let text = lines
            .iter()
            .map(|line| format!("{line}\n"))
            .collect::<String>();
        Ok(fs::write(self.cluster.path(path), text)?)
    }

    /// Checks what the helper said: `command` is how its line about the command starts, `variables`
    /// are all of its variables, without the common start of their names.
    fn is_wrapped(&self, output: &str, command: &str, variables: &[&str]) -> Result<()> {
        let mut said = output
            .lines()
            .filter_map(|line| line.strip_prefix("helper: "));
        ensure!(said.next() == Some(self.way), "not {}: {output}", self.way);
        let line = said.next().unwrap_or_default();
        ensure!(line.starts_with(command), "not {command:?}: {output}");
        let found: Vec<_> = said
            .map(|line| line.strip_prefix("CONTAINER_CHECKPOINT").unwrap_or(line))
            // Every wrapped task is told, or a front would not be there where it is needed.
            .filter(|variable| *variable != "_PROCTRACK=cgroup")
            .collect();
        ensure!(
            output.contains("CONTAINER_CHECKPOINT_PROCTRACK=cgroup"),
            "proctrack is not told: {output}"
        );
        ensure!(
            found == variables,
            "{found:?} is not {variables:?}: {output}"
        );
        Ok(())
    }
}

/// A plugin that has an option `--container-image` of its own, for a Slurm of this version.
fn other_plugin(version: u32) -> Result<Vec<u8>> {
    const SOURCE: &str = r#"
        #include <slurm/spank.h>
        const char plugin_name[] = "other", plugin_type[] = "spank";
        const unsigned int plugin_version = VERSION;
        static int given(int val, const char *arg, int remote) {
            if (!remote)
                slurm_info("other: %s", arg);
            return 0;
        }
        static struct spank_option option = {
            "container-image", "X", "the other plugin's image", 1, 0, given
        };
        int slurm_spank_init(spank_t sp, int ac, char **av) {
            return spank_option_register(sp, &option);
        }"#;
    let directory = tempfile::tempdir()?;
    let (source, library) = (
        directory.path().join("other.c"),
        directory.path().join("other.so"),
    );
    fs::write(&source, SOURCE)?;
    let compiled = Command::new("gcc")
        .args(["-shared", "-fPIC", &format!("-DVERSION={version}"), "-o"])
        .args([&library, &source])
        .output()
        .context("gcc could not be run")?;
    if !compiled.status.success() {
        bail!("gcc failed: {}", String::from_utf8_lossy(&compiled.stderr));
    }
    read(&library)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))
}
