//! DMTCP in the container image: Apptainer's chapter "Self-Contained Checkpointing in a Container" step
//! by step with its own example, outside of Slurm, and what it is for on a cluster. Its image is
//! built as it says, with the nodes' DMTCP in place of one that is compiled for it.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use lab::Cluster;
use support::*;

const DEFINITION: &str = include_str!("programs/self-contained.def");

/// A script around its application, with something before and after it.
const AROUND: &str = "#!/bin/bash
echo before
dmtcp_launch --coord-port 0 python3 -c 'print(\"first\", flush=True)'
dmtcp_launch --coord-port 0 --interval 3600 python3 lines.py around.gate 7
echo \"after: $?\"
exit 9
";

type Case = fn(&Cluster) -> Result<()>;

#[test]
fn dmtcp_in_the_image() -> Result<()> {
    if !have("dmtcp")? {
        return Ok(());
    }
    let cluster = &cluster()?;
    build(cluster)?;
    cluster.write("alice", "/home/alice/around.sh", AROUND)?;
    let cases: &[(&str, Case)] = &[
        ("the chapter", chapter),
        ("exec", exec),
        ("a shell at a terminal", typed),
        ("shell", shell),
        ("a step with a runscript", runscript),
        ("a script around its application", around),
        ("a batch script in the image", batch),
        ("a command that knows nothing of it", whole),
        ("chosen and refused", chosen),
        ("a checkpoint of Apptainer's", take_over),
        ("a compressed checkpoint", compressed),
    ];
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failed = Vec::new();
        while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = case(cluster) {
                failed.push(format!("{name}: {error:#}"));
            }
        }
        failed
    };
    let mut failed: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
        let failed = workers.into_iter().map(|worker| worker.join());
        failed
            .flat_map(|failed| failed.unwrap_or_else(|_| vec!["a case panicked".into()]))
            .collect()
    });
    if let Err(error) = cluster.wait_nothing_left(LIMIT) {
        failed.push(format!("{error:#}"));
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

/// "Building the Container".
fn build(cluster: &Cluster) -> Result<()> {
    let dmtcp = cluster.dmtcp().context("no DMTCP in the cluster")?;
    let atomic = cluster.run("alice", "ls /usr/lib/*/libatomic.so.1")?.ok()?;
    let definition = DEFINITION
        .replace("DMTCP/", &format!("{}/", dmtcp.display()))
        .replace("LIBATOMIC", atomic.trim());
    cluster.write("alice", "/home/alice/myapp.def", &definition)?;
    let build = "apptainer build --mksquashfs-args '-comp lz4' myapp.sif myapp.def";
    cluster.run("alice", build)?.ok().map(drop)
}

/// A server with a state, and who asks it for that: in the manner of Apptainer's chapter on its own
/// checkpoints.
const SERVER: &str = include_str!("programs/server.py");
const ASK: &str = include_str!("programs/ask.py");
const SERVER_IMAGE: &str = "Bootstrap: localimage
From: /images/python.sif

%files
    LIBATOMIC
    server.py /app/server.py

%startscript
    exec python3 /app/server.py $@
";

/// `import-apptainer`: from Apptainer's feature to this one, with the state of the server.
fn take_over(cluster: &Cluster) -> Result<()> {
    let run = |line: &str| cluster.run("alice", line)?.ok();
    let atomic = run("ls /usr/lib/*/libatomic.so.1")?;
    let definition = SERVER_IMAGE.replace("LIBATOMIC", atomic.trim());
    for (file, text) in [
        ("server.def", definition.as_str()),
        ("server.py", SERVER),
        ("ask.py", ASK),
    ] {
        cluster.write("alice", format!("/home/alice/{file}"), text)?;
    }
    run("apptainer build --mksquashfs-args '-comp lz4' server.sif server.def")?;
    // "Installation" of DMTCP, as that chapter says.
    let dmtcp = cluster.dmtcp().context("no DMTCP in the cluster")?;
    let install = format!(
        "echo {}/lib/dmtcp >/etc/ld.so.conf.d/dmtcp.conf; /sbin/ldconfig",
        dmtcp.display()
    );
    cluster.run("root", &install)?.ok()?;
    let refused = |name: &str, code: i32, expected: &str| -> Result<()> {
        let line = format!("container-checkpoint import-apptainer '{name}' server.sif");
        let ran = cluster.run("alice", &line)?;
        let error = format!("container-checkpoint: error: {expected}");
        let said = ran.stderr.lines().any(|line| line.starts_with(&error));
        ensure!(ran.status.code() == Some(code) && said, "{name}: {ran:?}");
        Ok(())
    };
    let dir = "/home/alice/.apptainer/checkpoint/dmtcp";

    run("apptainer checkpoint create example-checkpoint")?;
    refused(
        "example-checkpoint",
        4,
        &format!("{dir}/example-checkpoint is damaged: there is no process image"),
    )?;
    run("apptainer instance start --dmtcp-launch example-checkpoint server.sif server 8888")?;
    ensure!(run("python3 ask.py 8888 count")? == "1\n");
    ensure!(run("python3 ask.py 8888 count")? == "2\n");
    run("apptainer checkpoint instance server")?;
    let restart = format!("{dir}/example-checkpoint/dmtcp_restart_script.sh");
    cluster.wait_file(&restart, LIMIT, |text| !text.is_empty())?;
    refused(
        "example-checkpoint",
        1,
        "checkpoint example-checkpoint of Apptainer is in use by the instance server: ",
    )?;
    run("apptainer instance stop server")?;
    for name in ["", "..", "../x", ".hidden"] {
        refused(name, 2, "")?;
    }
    refused("other", 3, "there is no checkpoint other of Apptainer")?;

    let import = "container-checkpoint import-apptainer example-checkpoint server.sif";
    let said = run(import)?;
    ensure!(
        said.starts_with(&format!(
            "example-checkpoint@1 came from {dir}/example-checkpoint ("
        )),
        "{said}"
    );
    refused(
        "example-checkpoint",
        1,
        "example-checkpoint has generations",
    )?;
    run("container-checkpoint verify example-checkpoint")?;
    // It goes on here, counts on, and a stop keeps what it has counted.
    let outside = Outside {
        cluster,
        name: "taken",
    };
    let line = "container-checkpoint run --name example-checkpoint ../server.sif \
                python3 /app/server.py 8888";
    for expected in ["3\n", "4\n"] {
        let on = |text: &str| text.contains("goes on from generation");
        let asked = std::sync::Mutex::new(None);
        let ask = |text: &str| {
            on(text)
                && asked.lock().is_ok_and(|mut asked| {
                    let orphans = "ps -eo ppid=,args= | grep -c '^ *1 .*DMTCP:python3' || true";
                    let answer =
                        || -> Result<_> { Ok((run("python3 ask.py 8888 count")?, run(orphans)?)) };
                    asked.replace(answer()).is_none()
                })
        };
        let text = outside.run(line, ask, "TERM")?;
        let asked = asked.into_inner().ok().flatten().context(text.clone())??;
        // As an orphan it would live as long as Apptainer waits for what still uses the image.
        let (asked, orphans) = asked;
        ensure!(orphans == "0\n", "the service is nobody's child");
        ensure!(asked == expected, "{asked} instead of {expected}{text}");
    }
    Ok(())
}

/// What a self-contained image leaves of a plain `dmtcp_launch`, whose default is gzip.
const COMPRESSED: &str = "set -e
mkdir gz; cd gz
apptainer exec ../myapp.sif dmtcp_launch --coord-port 0 --port-file port python3 /app/server.py >out &
until [ -s port ] && grep -q ^3 out; do sleep 0.1; done
apptainer exec ../myapp.sif dmtcp_command --coord-port $(cat port) --checkpoint >/dev/null
# That does not wait, and DMTCP does not wait for gzip.
until [ -s dmtcp_restart_script.sh ] && gzip -t <$(echo ckpt_*.dmtcp) 2>/dev/null; do sleep 0.1; done
kill $!; wait $! || true
head -c -1000 $(echo ckpt_*.dmtcp) >../cut/$(echo ckpt_*.dmtcp)
";

/// It is taken over and goes on, although all that it writes from then on is compressed as well.
fn compressed(cluster: &Cluster) -> Result<()> {
    let script = format!("mkdir cut; {COMPRESSED}");
    cluster.run("alice", &script)?.ok()?;
    let import = |from: &str| {
        let line = format!("container-checkpoint import-apptainer --from {from} zipped myapp.sif");
        cluster.run("alice", &line)
    };
    let cut = import("cut")?;
    ensure!(
        cut.status.code() == Some(4) && cut.stderr.contains("/home/alice/cut is damaged: "),
        "{cut:?}"
    );
    let said = import("gz")?.ok()?;
    ensure!(
        said.starts_with("zipped@1 came from /home/alice/gz ("),
        "{said}"
    );
    let of = |file: &str| cluster.run("alice", &format!("head -c 5 {file}"))?.ok();
    ensure!(of("gz/ckpt_*.dmtcp")?.starts_with('\u{1f}'));
    ensure!(of(".container-checkpoint/zipped/generations/*1/rank-0/ckpt_*.dmtcp")? == "DMTCP");
    let outside = Outside {
        cluster,
        name: "zipped",
    };
    let two = |text: &str| numbers(text).len() >= 2;
    let mut next = None;
    for _ in 0..2 {
        let text = outside.run("$RUN -- apptainer run ../myapp.sif", two, "TERM")?;
        let (first, last) = counted(&text)?;
        ensure!(first > 0 && next.is_none_or(|next| next == first), "{text}");
        next = Some(last + 1);
    }
    Ok(())
}

/// A run outside of Slurm, in a directory of its own.
struct Outside<'a> {
    cluster: &'a Cluster,
    name: &'a str,
}

impl Outside<'_> {
    /// Runs a line in the directory until `until` has been written, then sends the signal; returns
    /// what it wrote.
    fn run(&self, line: &str, until: impl Fn(&str) -> bool, signal: &str) -> Result<String> {
        let Outside { cluster, name } = *self;
        // A file of its own for each run: what an earlier one wrote beyond its last generation would
        // be cut off.
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let out = format!("{name}.{}.out", RUNS.fetch_add(1, Ordering::Relaxed));
        let file = format!("/home/alice/{out}");
        // The helper takes the place of the shell, which says its number.
        let script = format!(
            "mkdir -p {name}; cd {name}; echo $$ >../{name}.pid; \
             export RUN='container-checkpoint run --name {name}'; exec {line} >../{out} 2>&1"
        );
        std::thread::scope(|scope| {
            let run = scope.spawn(|| cluster.run("alice", &script));
            let seen = cluster.wait_file(&file, LIMIT, &until);
            let kill = format!("kill -{signal} $(cat {name}.pid)");
            let killed = cluster.run("alice", &kill).and_then(|killed| killed.ok());
            let run = run.join().map_err(|_| anyhow!("a thread panicked"))?;
            let text = std::fs::read_to_string(cluster.path(&file)).unwrap_or_default();
            seen.and(killed)
                .and(run)
                .with_context(|| format!("{line} said:\n{text}"))?;
            Ok(text)
        })
    }
}

/// The numbers of an output, which have to follow each other; the first and the last.
fn counted(text: &str) -> Result<(u64, u64)> {
    let numbers = numbers(text);
    let (first, last) = numbers.first().zip(numbers.last()).context("no numbers")?;
    let expected: Vec<u64> = (*first..=*last).collect();
    ensure!(numbers == expected, "{text}");
    Ok((*first, *last))
}

fn chapter(cluster: &Cluster) -> Result<()> {
    let outside = Outside {
        cluster,
        name: "ckpt",
    };
    // "Running and Checkpointing": the interval by its variable, then control-C.
    let saved =
        |number: u64| move |text: &str| text.contains(&format!("generation {number} saved"));
    let line = "env DMTCP_CHECKPOINT_INTERVAL=2 $RUN -- apptainer run ../myapp.sif";
    let text = outside.run(line, saved(1), "INT")?;
    let (first, last) = counted(&text)?;
    ensure!(first == 0, "{text}");
    // "verify that checkpoint files have been written": into the store, and nowhere else.
    ensure!(cluster.run("alice", "ls ckpt")?.ok()?.is_empty());
    let list = cluster
        .run("alice", "container-checkpoint list ckpt")?
        .ok()?;
    ensure!(list.contains("ckpt@1 "), "{list}");
    let shown = "container-checkpoint show --json ckpt@1";
    let shown = cluster.run("alice", shown)?.ok()?;
    ensure!(shown.contains("\"placement\": \"contained\""), "{shown}");

    // "Restarting from a Checkpoint". The interval is still what it was.
    let text = outside.run("$RUN -- apptainer run ../myapp.sif", saved(2), "INT")?;
    let (again, later) = counted(&text)?;
    ensure!(
        0 < again && again <= last + 1 && again < later,
        "{last}: {text}"
    );
    ensure!(text.contains("goes on from generation 1"), "{text}");

    // "Restarting with exec".
    let line = "$RUN -- apptainer exec ../myapp.sif ./dmtcp_restart_script.sh";
    let two = |text: &str| numbers(text).len() >= 2;
    let text = outside.run(line, two, "TERM")?;
    let (again, last) = counted(&text)?;
    ensure!(0 < again && again <= later + 1, "{later}: {text}");
    // What is stopped goes on exactly.
    let text = outside.run("$RUN -- apptainer run ../myapp.sif", two, "TERM")?;
    ensure!(counted(&text)?.0 == last + 1, "{last}: {text}");

    // "Starting Fresh".
    let line = "$RUN --restart fresh -- apptainer run ../myapp.sif";
    let text = outside.run(line, two, "INT")?;
    ensure!(counted(&text)?.0 == 0, "{text}");
    Ok(())
}

/// "Launching with exec", twice.
fn exec(cluster: &Cluster) -> Result<()> {
    let outside = Outside {
        cluster,
        name: "exec",
    };
    let line = "env DMTCP_GZIP=1 $RUN -- apptainer exec ../myapp.sif dmtcp_launch --gzip --interval 60 \
                --coord-port 0 --ckpt-open-files python3 /app/server.py";
    goes_on(&outside, line)?;
    // Whatever an application makes of that variable by itself.
    let outside = Outside {
        cluster,
        name: "unset",
    };
    let line = "$RUN --placement injected -- apptainer exec ../myapp.sif env -u DMTCP_GZIP python3 \
                /app/server.py";
    goes_on(&outside, line)
}

/// A terminal for the chapter's shell.
const TYPED: &str = include_str!("programs/typed.py");

/// "Interactive debugging with shell": what is typed is done again, what it starts goes on.
fn typed(cluster: &Cluster) -> Result<()> {
    let outside = Outside {
        cluster,
        name: "typed",
    };
    cluster.write("alice", "/home/alice/typed.py", TYPED)?;
    let line = "python3 ../typed.py 'dmtcp_launch --coord-port 0 python3 /app/server.py' \
                $RUN -- apptainer shell ../myapp.sif";
    goes_on(&outside, line)
}

/// The same with a shell that reads its commands from a file: those that were done are not done again.
fn shell(cluster: &Cluster) -> Result<()> {
    let outside = Outside {
        cluster,
        name: "shell",
    };
    let commands = "echo once >>once\ndmtcp_launch --coord-port 0 python3 /app/server.py\n";
    cluster.write("alice", "/home/alice/commands", commands)?;
    goes_on(
        &outside,
        "$RUN -- apptainer shell ../myapp.sif <../commands",
    )?;
    let once = cluster.run("alice", "cat shell/once")?.ok()?;
    ensure!(once == "once\n", "{once}");
    Ok(())
}

fn goes_on(outside: &Outside, line: &str) -> Result<()> {
    let two = |text: &str| numbers(text).len() >= 2;
    let first = outside.run(line, two, "TERM")?;
    let (zero, last) = counted(&first)?;
    let second = outside.run(line, two, "TERM")?;
    ensure!(
        zero == 0 && counted(&second)?.0 == last + 1,
        "{first}\n{second}"
    );
    Ok(())
}

/// Submits a script, pre-empts it in between, and returns its whole output.
fn preempted(cluster: &Cluster, name: &str, more: &[&str], script: &str) -> Result<String> {
    let mut options = options("dmtcp", name);
    options.extend(more.iter().map(ToString::to_string));
    let job = sbatch(cluster, &options, &format!("#!/bin/bash\n{script}\n"))?;
    let result = (|| {
        node(cluster, job)?;
        wait_progress(cluster, name, 2)?;
        cluster
            .run("alice", &format!("scontrol requeue {job}"))?
            .ok()?;
        wait_run(cluster, job, 1)?;
        wait_progress(cluster, name, 2)?;
        open_gate(cluster, name)?;
        Ok(())
    })();
    explained(cluster, name, result)?;
    if !script.contains("lines.py") && !script.contains("around") {
        cluster.run("alice", &format!("scancel {job}"))?.ok()?;
    }
    cluster.wait_end(job, LIMIT)?;
    output(cluster, name)
}

fn runscript(cluster: &Cluster) -> Result<()> {
    let text = preempted(cluster, "runscript", &[], "srun apptainer run myapp.sif")?;
    ensure!(counted(&text)?.0 == 0, "{text}");
    Ok(())
}

/// What is before the application runs again, and what is finished or comes later does not.
fn around(cluster: &Cluster) -> Result<()> {
    let script = "srun apptainer exec myapp.sif ./around.sh; echo \"step: $?\"";
    let text = preempted(cluster, "around", &[], script)?;
    exact(&text)?;
    for (line, count) in [("before", 2), ("first", 1), ("after: 7", 1), ("step: 9", 1)] {
        let found = text.lines().filter(|other| *other == line).count();
        ensure!(found == count, "{found} times {line:?}:\n{text}");
    }
    Ok(())
}

fn batch(cluster: &Cluster) -> Result<()> {
    let image = "--container-image=/home/alice/myapp.sif";
    let script = "dmtcp_launch --new-coordinator python3 lines.py batch.gate";
    exact(&preempted(cluster, "batch", &[image], script)?)
}

fn whole(cluster: &Cluster) -> Result<()> {
    let script = "srun --container-image=/home/alice/myapp.sif python3 lines.py whole.gate";
    exact(&preempted(cluster, "whole", &[], script)?)?;
    let manifest = "cat .container-checkpoint/whole/*/*/generations/*/manifest.json";
    let manifest = cluster.run("alice", manifest)?.ok()?;
    ensure!(
        manifest.contains("\"placement\": \"contained\""),
        "{manifest}"
    );
    Ok(())
}

/// The placement can be chosen, stays what it was, and is refused where it cannot be.
fn chosen(cluster: &Cluster) -> Result<()> {
    let outside = Outside {
        cluster,
        name: "chosen",
    };
    goes_on(
        &outside,
        "$RUN --placement injected -- apptainer run ../myapp.sif",
    )?;
    for (line, code, expected) in [
        (
            "run --name chosen --placement contained myapp.sif",
            1,
            "generation 2 of chosen cannot go on here: DMTCP was injected then and is to be contained \
             now (--container-checkpoint-placement)",
        ),
        (
            "run --name none --placement contained /images/python.sif true",
            1,
            "no engine can keep this application resumable: dmtcp: the container image has no DMTCP \
             of its own: there is no dmtcp_launch in its PATH; use \
             --container-checkpoint-placement=auto, or install DMTCP in the image",
        ),
        (
            "run --name none --placement contained -- true",
            1,
            "the placement contained needs a container image whose DMTCP is used",
        ),
        (
            "run --name none --placement inside myapp.sif",
            1,
            "placement: `inside` is none of auto, injected, contained",
        ),
        (
            "run --name none --placement contained --engine criu myapp.sif",
            1,
            "the placement (contained) is DMTCP's, and the engine is to be criu",
        ),
        (
            "run --name none myapp.sif ./dmtcp_restart_script.sh",
            99,
            "dmtcp_restart_script.sh: there is no saved state to go on from. A checkpoint that DMTCP \
             wrote without container-checkpoint is taken over by `container-checkpoint \
             import-apptainer --from DIRECTORY NAME IMAGE`",
        ),
    ] {
        let ran = cluster.run("alice", &format!("container-checkpoint {line}"))?;
        let error = format!("container-checkpoint: error: {expected}");
        let said = ran.stderr.lines().any(|line| line == error);
        ensure!(ran.status.code() == Some(code) && said, "{line}: {ran:?}");
    }
    let check = "container-checkpoint check --name chosen --placement contained --image myapp.sif";
    let said = cluster.run("alice", check)?;
    let problem = "problem  restart    the saved state cannot go on: DMTCP was injected then and is to be \
                   contained now (--container-checkpoint-placement)\n";
    ensure!(
        said.status.code() == Some(7) && said.stdout.contains(problem),
        "{said:?}"
    );
    Ok(())
}
