//! `container-checkpoint check`: every finding provoked once, on a real node; and the same check at
//! submission, asked for by the plugin, in Slurm 22.05, 24.11 and 26.05.

mod support;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use lab::{Cluster, File, Release, Spec};
use serde_json::Value;
use support::*;

const PYTHON: &str = "--image /images/python.sif";
const CHECK: &str = "container-checkpoint check";

const OTHER_STORE: &str = "choose another directory as the store (--container-checkpoint-dir, `dir` in \
the configuration)";
const ANOTHER_IMAGE: &str = "name another image, or copy or build it anew";
const USE_CRIU: &str = "use --container-checkpoint-engine=criu";
const WITHOUT_IO_URING: &str = "let the application do without io_uring (an option or a variable of \
its own), or let it save its state itself";
const PLACEMENT: &str = "the placement is auto, injected (the node's DMTCP, brought into the container) \
or contained (the container image's own DMTCP)";
const MORE_TIME: &str = "take checkpoints in between (--container-checkpoint-interval=auto), use a \
partition with a GraceTime, or have the administrator raise KillWait";

/// What a check found.
struct Found {
    document: Value,
    code: i32,
}

impl Found {
    fn by(cluster: &Cluster, node: Option<&str>, command: &str) -> Result<Found> {
        let argv = ["sh", "-c", command];
        let output = cluster.exec(node, "alice", &argv, "", LIMIT)?;
        let document = serde_json::from_str(&output.stdout)
            .with_context(|| format!("{command}: {output:?}"))?;
        let code = output.status.code().context("no exit code")?;
        Ok(Found { document, code })
    }

    fn findings(&self) -> impl Iterator<Item = &Value> {
        self.document["findings"].as_array().into_iter().flatten()
    }

    /// Checks that there is this finding, to the letter, and that the exit code is that of the worst.
    fn has(&self, level: &str, about: &str, cause: &str, cure: &str) -> Result<()> {
        let cure = (!cure.is_empty()).then_some(cure);
        ensure!(
            self.findings().any(|finding| finding["about"] == about
                && finding["level"] == level
                && finding["cause"] == cause
                && finding["cure"].as_str() == cure),
            "no {level} about {about}: {cause:?} -> {cure:?} in {:#}",
            self.document
        );
        let worst = |level| self.findings().any(|finding| finding["level"] == level);
        let (word, code) = match (worst("problem"), worst("warning")) {
            (true, _) => ("problem", 7),
            (false, true) => ("warning", 6),
            (false, false) => ("ok", 0),
        };
        ensure!(
            self.document["format"] == 1 && self.document["worst"] == word && self.code == code,
            "{} and {:#}",
            self.code,
            self.document
        );
        Ok(())
    }
}

/// Something that is wrong: the options that show it, and the finding.
type Case<'a> = (&'a str, &'a str, &'a str, &'a str, &'a str);

/// Runs checks, two at a time; what is wrong.
fn all(cluster: &Cluster, cases: &[Case], wrong: &mut Vec<String>) {
    let run = |cases: &[Case]| -> Vec<String> {
        let failed = cases
            .iter()
            .filter_map(|(options, level, about, cause, cure)| {
                let (before, options) = options.split_once("check ").unwrap_or(("", options));
                let command = format!("{before}{CHECK} --json {options}");
                Found::by(cluster, None, &command)
                    .and_then(|found| found.has(level, about, cause, cure))
                    .err()
                    .map(|error| format!("{options}: {error:#}"))
            });
        failed.collect()
    };
    let (some, others) = cases.split_at(cases.len() / 2);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| run(some));
        wrong.extend(run(others));
        match thread.join() {
            Ok(failed) => wrong.extend(failed),
            Err(_) => wrong.push("a thread of the test panicked".into()),
        }
    });
}

#[test]
fn every_finding_is_told_with_its_cause_and_cure() -> Result<()> {
    let cluster = with(&Spec {
        nodes: 1,
        ..spec()?
    })?;
    files(&cluster)?;
    let mut wrong = Vec::new();
    let mut part = |name: &str, result: Result<()>| {
        if let Err(error) = result {
            wrong.push(format!("{name}: {error:#}"));
        }
    };
    part("all is well", all_is_well(&cluster));
    part("saved state", saved_state(&cluster));
    part("room", stores(&cluster));
    part("the node", apptainer(&cluster));
    part("check --node", node(&cluster));
    part("at a job's start", at_start(&cluster));
    part("a script", script(&cluster));
    images(&cluster, &mut wrong);
    programs(&cluster, &mut wrong)?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}

/// Images and programs in alice's home.
fn files(cluster: &Cluster) -> Result<()> {
    let whole = fs::read(cluster.path("/images/static.sif"))?;
    let image = |name: &str, bytes: &[u8]| {
        let path = cluster.path(format!("/home/alice/{name}"));
        fs::write(&path, bytes)?;
        Ok::<_, anyhow::Error>(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o644),
        )?)
    };
    image("cut.sif", &whole[..1_000_000])?;
    let mut other = whole.clone();
    other[45..47].copy_from_slice(b"05");
    image("other.sif", &other)?;
    let system = whole.windows(4).position(|four| four == b"hsqs");
    let system = system.context("no squashfs in static.sif")?;
    other.clone_from(&whole);
    other[system..system + 4].fill(0);
    image("overwritten.sif", &other)?;

    let scratch = tempfile::tempdir()?;
    let compile = |compiler: &str, arguments: &[&str]| {
        let out = Command::new(compiler)
            .args(arguments)
            .current_dir(&scratch)
            .output();
        let out = out.with_context(|| format!("{compiler} (tests/setup.sh installs it)"))?;
        ensure!(out.status.success(), "{compiler}: {out:?}");
        Ok(())
    };
    fs::write(
        scratch.path().join("main.c"),
        "int main(void) { return 0; }\n",
    )?;
    compile("musl-gcc", &["main.c", "-o", "musl"])?;
    for (library, program) in [
        ("liburing.so.2", "uring"),
        ("libhwloc.so.15", "hwloc"),
        ("libcudart.so.12", "cuda"),
    ] {
        let name = format!("-Wl,-soname,{library}");
        compile(
            "gcc",
            &["-shared", "-x", "c", "/dev/null", &name, "-o", library],
        )?;
        let path = "-Wl,--no-as-needed,-rpath,$ORIGIN";
        compile("gcc", &["main.c", path, library, "-o", program])?;
    }
    for name in [
        "musl",
        "liburing.so.2",
        "uring",
        "libhwloc.so.15",
        "hwloc",
        "libcudart.so.12",
        "cuda",
    ] {
        let path = cluster.path(format!("/home/alice/{name}"));
        fs::copy(scratch.path().join(name), &path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    cluster.write("alice", "/home/alice/text", "#!/no/such/program\n")
}

fn all_is_well(cluster: &Cluster) -> Result<()> {
    let line =
        format!("{CHECK} {PYTHON} --engine criu --name new-%j --partition grace -- python3 x.py");
    let said = cluster.run("alice", &line)?.ok()?;
    let version = said
        .lines()
        .find_map(|line| line.strip_prefix("ok       apptainer  "))
        .context(said.clone())?;
    let criu = said
        .lines()
        .find_map(|line| line.strip_prefix("ok       engine     criu "))
        .context(said.clone())?;
    let expected = format!(
        "ok       store      /home/alice/.container-checkpoint can be written\n\
         ok       image      /images/python.sif is a SIF file, whole by its header\n\
         ok       apptainer  {version}\n\
         ok       fuse       /dev/fuse can be used\n\
         ok       userns     user namespaces can be made\n\
         ok       program    python3 (/usr/bin/python3): dynamic, glibc 2.36\n\
         ok       engine     criu {criu}\n\
         ok       room       how much will be needed is not known yet\n\
         ok       time       a pre-empted job has 45.0 s (KillWait 30.0 s, GraceTime 15.0 s of \
         grace): enough for about 1.2 GB of memory, more on a fast store\n"
    );
    ensure!(said == expected, "{said}");
    ensure!(criu.ends_with(" can hold it"), "{criu}");
    if have("dmtcp")? {
        let found = Found::by(
            cluster,
            None,
            &format!("{CHECK} --json {PYTHON} -- python3"),
        )?;
        let dmtcp = found.findings().any(|finding| {
            finding["cause"] == "dmtcp 4.1.1 can hold it" && finding["of"] == "node"
        });
        ensure!(dmtcp && found.code == 0, "{:#}", found.document);
    }
    // What a store's directory is called in the options counts here as well.
    let line = format!("CONTAINER_CHECKPOINT_DIR=%h/stores/%u {CHECK} --json");
    let text = "/home/alice/stores/alice can be written";
    Found::by(cluster, None, &line)?.has("ok", "store", text, "")
}

fn images(cluster: &Cluster, wrong: &mut Vec<String>) {
    // Where the programs of the system are not found.
    let bare = "mkdir -p bare; ln -sf /usr/bin/container-checkpoint bare; export PATH=$HOME/bare; ";
    let lonely = format!("{bare}check --image /images/static.sif");
    let configured = format!(
        "echo 'apptainer: /usr/bin/apptainer' > there.yaml; {bare}check --config there.yaml --image \
         /images/static.sif"
    );
    let cases: [Case; 12] = [
        (
            &lonely,
            "problem",
            "apptainer",
            "neither apptainer nor singularity is in PATH on this node",
            "install Apptainer, or set `apptainer` in /etc/slurm/container-checkpoint.yaml",
        ),
        (
            &configured,
            "warning",
            "userns",
            "cannot run unshare, which tries out user namespaces: No such file or directory (os \
             error 2)",
            "install util-linux",
        ),
        (
            "install -m 0 /images/static.sif secret.sif; check --image secret.sif",
            "problem",
            "image",
            "/home/alice/secret.sif: could not read the container image: Permission denied (os error 13)",
            ANOTHER_IMAGE,
        ),
        (
            "mkdir -p box; check -- apptainer exec --writable box true",
            "problem",
            "image",
            "the option --writable cannot be combined with checkpoints as it is: Apptainer then makes \
             no directory for what is bound into the image. Make one (`mkdir \
             /home/alice/box/.container-checkpoint`), or use --writable-tmpfs or an --overlay",
            ANOTHER_IMAGE,
        ),
        (
            "--image /etc/hostname",
            "problem",
            "image",
            "/etc/hostname: it is no container image: neither SIF nor squashfs nor ext3",
            ANOTHER_IMAGE,
        ),
        (
            "--partition nowhere",
            "warning",
            "time",
            "there is no partition nowhere",
            "see `sinfo -s`",
        ),
        (
            "--image /images/none.sif",
            "problem",
            "image",
            "cannot use the image /images/none.sif: No such file or directory (os error 2)",
            "check the path: every node has to see the image there",
        ),
        (
            "--image docker://alpine",
            "problem",
            "image",
            "the image docker://alpine is an address: pull it into a file first (`apptainer pull \
             app.sif docker://alpine`), so that every run has the same",
            "name that file instead; every node has to see it there",
        ),
        (
            "--image cut.sif",
            "problem",
            "image",
            "/home/alice/cut.sif: the container image is damaged: it has 1000000 bytes, and its \
             data goes to byte 1482752: it was cut short or written over",
            ANOTHER_IMAGE,
        ),
        (
            "--image other.sif",
            "problem",
            "image",
            "/home/alice/other.sif: the container image is made for another machine (code 05 in \
             its header, not 02, amd64)",
            ANOTHER_IMAGE,
        ),
        (
            "--image overwritten.sif",
            "problem",
            "image",
            "/home/alice/overwritten.sif: the container image is damaged: there is no squashfs \
             where its table of contents says",
            ANOTHER_IMAGE,
        ),
        (
            "echo 'apptainer: /nowhere/apptainer' > nowhere.yaml; check --config nowhere.yaml \
             --image /images/static.sif",
            "problem",
            "apptainer",
            "cannot run `/nowhere/apptainer --version`: No such file or directory (os error 2)",
            "install Apptainer anew",
        ),
    ];
    all(cluster, &cases, wrong);
}

fn programs(cluster: &Cluster, wrong: &mut Vec<String>) -> Result<()> {
    let python = |options: &str| format!("{PYTHON} {options}");
    let uring = "it is linked with liburing.so.2: if it uses io_uring, its checkpoints are refused";
    let gpu = |by: &str| {
        format!("a GPU is asked for ({by}): what an application keeps on it is not saved")
    };
    let no_gpu = "ask for none, use it in parts of the job that are not made resumable, or let the \
                  application save its state itself";
    let (nv, rocm, slurm) = (gpu("--nv"), gpu("--rocm"), gpu("$SLURM_GPUS_ON_NODE"));
    // Nobody listens there.
    let unanswered = "printf 'ClusterName=x\\nSlurmctldHost=login(127.0.0.1)\\nSlurmctldPort=9\\n\
                      NodeName=n\\nPartitionName=p Nodes=n\\n' > dead.conf; \
                      export SLURM_CONF=$HOME/dead.conf; check --name unanswered"
        .to_owned();
    let lines = [
        python("-- no-such-program"),
        python("-- ./text"),
        python("--engine criu -- ./uring"),
        python("--engine criu -- ./cuda"),
        python("--engine criu --apptainer-option --nv"),
    ];
    let cases: Vec<Case> = vec![
        (
            &lines[0],
            "problem",
            "program",
            "no-such-program is not found",
            "check the command and the container image",
        ),
        (
            &lines[1],
            "problem",
            "program",
            "cannot run ./text: ./text needs the interpreter /no/such/program, which is not there",
            "check the command and the container image",
        ),
        (&lines[2], "warning", "libraries", uring, WITHOUT_IO_URING),
        (
            &lines[3],
            "warning",
            "libraries",
            "it is linked with libcudart.so.12: what it keeps on a GPU is not saved",
            "run it without a GPU, or let the application save its state itself",
        ),
        (&lines[4], "warning", "gpu", &nv, no_gpu),
        (
            "export SLURM_GPUS_ON_NODE=1; check ",
            "warning",
            "gpu",
            &slurm,
            no_gpu,
        ),
        (
            "--engine criu -- apptainer -q exec --rocm /images/static.sif counter",
            "warning",
            "gpu",
            &rocm,
            no_gpu,
        ),
        (
            "export SLURM_JOB_GPUS=0; check --engine criu -- apptainer exec --nv /images/static.sif \
             counter",
            "problem",
            "gpu",
            "--nv gives the application the GPUs that this job has (SLURM_JOB_GPUS), and what is on \
             a GPU cannot be saved",
            "leave --nv out, or ask for no GPUs",
        ),
        (
            "-- apptainer exec /images/none.sif true",
            "problem",
            "image",
            "cannot use the image /images/none.sif: No such file or directory (os error 2)",
            "check the path: every node has to see the image there",
        ),
        (
            "-- apptainer instance start app.sif a",
            "warning",
            "program",
            "it starts no application of its own: there is nothing to save",
            "make the command that runs the application resumable",
        ),
        (
            "-- apptainer exec --no-such-option app.sif true",
            "problem",
            "program",
            "apptainer exec has no option --no-such-option: Error for command \"exec\": unknown flag: --no-such-option",
            "see whether the command runs without checkpoints",
        ),
        (
            "--engine criu -- /usr/bin/passwd",
            "warning",
            "program",
            "it is setuid or setgid, and under CRIU it runs without other rights than yours",
            "use a copy without that bit",
        ),
        (
            "echo 'criu: /nowhere/criu' > nocriu.yaml; check --config nocriu.yaml --engine criu",
            "problem",
            "engine",
            "CRIU is not at /nowhere/criu, where the configuration says it is",
            "install it on the nodes",
        ),
        (
            "echo 'dmtcp: [/nowhere]' > nodmtcp.yaml; export PATH=/usr/bin:/bin; check --config \
             nodmtcp.yaml --engine dmtcp",
            "problem",
            "engine",
            "DMTCP is not installed: no dmtcp_launch in PATH",
            "install DMTCP 4 or name its prefix in the configuration",
        ),
        (
            "echo 'keep: 0' > bad.yaml; check --config bad.yaml",
            "problem",
            "config",
            "configuration file bad.yaml, line 1, column 7: 0 is outside of 1 to 1000",
            "correct the file, or have its administrator do it: jobs fail at their start",
        ),
        (
            "--engine criu --placement contained",
            "problem",
            "engine",
            "the placement (contained) is DMTCP's, and the engine is to be criu",
            PLACEMENT,
        ),
        (
            "--placement inside",
            "problem",
            "engine",
            "placement: `inside` is none of auto, injected, contained",
            PLACEMENT,
        ),
        (
            "mkdir -p empty; check --engine criu -- apptainer shell empty",
            "problem",
            "program",
            "there is no shell in /home/alice/empty: neither /bin/bash nor /bin/sh",
            "name another one by --shell",
        ),
        (
            "mkdir -p wide; chmod 777 wide; check --dir wide",
            "problem",
            "store",
            "/home/alice/wide cannot be used as a store: its mode 0777 lets others write to it; `chmod \
             go-w` it, if you trust what is in it",
            OTHER_STORE,
        ),
        (
            "mkdir -p closed; chmod 500 closed; ls -A closed; check --dir closed/in",
            "problem",
            "store",
            "could not create /home/alice/closed/in: Permission denied (os error 13)",
            OTHER_STORE,
        ),
        (
            "check --dir a:b -- true",
            "problem",
            "store",
            "cannot prepare the programs for the container: cannot keep programs under \
             /home/alice/a:b: its path has one of : ; , \" \\ in it",
            "choose another directory as the store",
        ),
        (
            "mkdir -pm 700 unread/odd; chmod 0 unread/odd; check --dir unread --name odd",
            "problem",
            "name",
            "could not read /home/alice/unread/odd/completed.json: Permission denied (os error 13)",
            "see what `container-checkpoint show` and `verify` say of it",
        ),
        (
            &unanswered,
            "warning",
            "time",
            "`scontrol show config` failed: slurm_load_ctl_conf error: Unable to contact slurm controller \
             (connect failure)",
            "see whether Slurm's controller runs (scontrol ping)",
        ),
        (
            "--engine blcr",
            "problem",
            "engine",
            "`blcr` is none of auto, dmtcp, criu",
            "the engine is auto, dmtcp or criu",
        ),
        (
            "--name a/b",
            "problem",
            "name",
            "`a/b` is not a checkpoint name",
            "a checkpoint name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and does not start \
             with a dot; %j %A %a %x %u stand for job id, array job id, array task id, job name and \
             user, %% is not allowed",
        ),
        (
            "--dir /etc/store",
            "problem",
            "store",
            "could not create /etc/store: Permission denied (os error 13)",
            OTHER_STORE,
        ),
    ];
    all(cluster, &cases, wrong);
    if !have("dmtcp")? {
        return Ok(());
    }
    let cases: [Case; 8] = [
        (
            "--engine dmtcp -- ./hwloc",
            "ok",
            "libraries",
            "it is linked with libhwloc.so.15, which is provided for",
            "",
        ),
        (
            "--image /images/static.sif --engine dmtcp -- counter",
            "problem",
            "engine",
            "DMTCP cannot hold /usr/bin/counter: it is linked statically",
            USE_CRIU,
        ),
        (
            "--image /images/static.sif -- counter",
            "ok",
            "engine",
            "not taken: DMTCP cannot hold /usr/bin/counter: it is linked statically; use \
             --container-checkpoint-engine=criu",
            "",
        ),
        (
            "--engine dmtcp -- ./musl",
            "problem",
            "engine",
            "DMTCP cannot hold ./musl: its libc is musl, not glibc",
            USE_CRIU,
        ),
        (
            "--engine dmtcp -- /usr/bin/passwd",
            "problem",
            "engine",
            "DMTCP cannot hold /usr/bin/passwd: it runs with another user's rights (setuid or \
             setgid)",
            USE_CRIU,
        ),
        (
            "--image /images/python.sif --engine dmtcp -- ./uring",
            "warning",
            "libraries",
            "it is linked with liburing.so.2: if it uses io_uring, the first checkpoint ends it",
            WITHOUT_IO_URING,
        ),
        (
            "export HWLOC_COMPONENTS=linux; check --engine dmtcp -- ./hwloc",
            "warning",
            "libraries",
            "it is linked with libhwloc.so.15, and HWLOC_COMPONENTS is set: DMTCP ends it at its \
             start if hwloc looks at devices in /sys",
            "unset HWLOC_COMPONENTS, which is then set so that hwloc does not",
        ),
        (
            "--engine dmtcp",
            "ok",
            "engine",
            "dmtcp 4.1.1: installed; give a command to see whether it can be held",
            "",
        ),
    ];
    all(cluster, &cases, wrong);
    Ok(())
}

/// A name that was saved: its size and time are known, and its image has to stay the same.
fn saved_state(cluster: &Cluster) -> Result<()> {
    cluster
        .run(
            "alice",
            "cp /images/python.sif mine.sif; cp mine.sif theirs.sif",
        )?
        .ok()?;
    // A byte deep inside, which no header tells.
    let image = fs::File::options()
        .write(true)
        .open(cluster.path("/home/alice/theirs.sif"))?;
    image.write_all_at(b"?", 50_000_000)?;
    let run = "container-checkpoint run --name saved --engine criu mine.sif python3 lines.py \
               saved.gate > saved.out 2>&1 &";
    cluster.run("alice", run)?.ok()?;
    let saved = || -> Result<()> {
        wait_progress(cluster, "saved", 5)?;
        let save = "container-checkpoint save saved --wait";
        cluster.run("alice", save)?.ok()?;
        let check = |rest: &str| {
            let line = format!("{CHECK} --json --name saved {rest} -- python3");
            Found::by(cluster, None, &line)
        };
        let found = check("--engine criu --image mine.sif")?;
        let whole = "/home/alice/mine.sif is a SIF file, whole by its header";
        found.has("ok", "image", whole, "")?;
        found.has("ok", "restart", "the saved state can go on here", "")?;
        let holder = cause(&found, "name");
        ensure!(
            holder.starts_with("saved is in use: a process outside of Slurm on login, process "),
            "{holder}"
        );
        found.has(
            "warning",
            "name",
            &holder,
            "let that one end first, or choose another name",
        )?;
        let room = cause(&found, "room");
        ensure!(
            room.starts_with("there is room for another ")
                && room.ends_with(" like the last checkpoint"),
            "{room}"
        );
        let time = cause(&found, "time");
        ensure!(
            time.starts_with("a checkpoint like the last (")
                && time.ends_with(", and a pre-empted job has 30.0 s (KillWait 30.0 s)"),
            "{time}"
        );
        check("--engine criu --image theirs.sif")?.has(
            "problem",
            "image",
            "/home/alice/theirs.sif is not the image that the saved state belongs to: a restart is \
             refused",
            "put the old image back, begin anew with --container-checkpoint-restart=fresh, or try \
             =force",
        )?;
        check("--engine criu")?.has(
            "problem",
            "restart",
            &format!(
                "the saved state cannot go on: the container image differs: saved with {}, here is none",
                digest(cluster)?
            ),
            "put the image back that was /home/alice/mine.sif then, or start fresh",
        )?;
        if have("dmtcp")? {
            check("--engine dmtcp --image mine.sif")?.has(
                "problem",
                "restart",
                "the saved state is criu's, which cannot be used here",
                "use the engine that saved it, on nodes that have it, or begin anew with \
                 --container-checkpoint-restart=fresh",
            )?;
        }
        open_gate(cluster, "saved")?;
        let ended = "while container-checkpoint list | grep -q running; do sleep 0.1; done";
        cluster.run("alice", ended)?.ok()?;
        let found = check("--engine criu --image theirs.sif")?;
        found.has("ok", "name", "saved starts from its beginning", "")?;
        ensure!(found.code == 0, "{:#}", found.document);
        Ok(())
    };
    explained(cluster, "saved", saved())
}

/// The causes of all findings about something.
fn cause(found: &Found, about: &str) -> String {
    let all = found.findings().filter(|finding| finding["about"] == about);
    let all: Vec<&str> = all
        .filter_map(|finding| finding["cause"].as_str())
        .collect();
    all.join("\n")
}

/// The digest of the image that the only generation of `saved` belongs to.
fn digest(cluster: &Cluster) -> Result<String> {
    let shown = cluster
        .run("alice", "container-checkpoint show saved@1 --json")?
        .ok()?;
    let shown: Value = serde_json::from_str(&shown)?;
    let digest = shown["manifest"]["image"]["digest"].as_str();
    Ok(digest.context("no digest")?.to_owned())
}

/// Stores that cannot be written, or have no room.
fn stores(cluster: &Cluster) -> Result<()> {
    let root = |script: &str| cluster.run_on("n1", "root", script)?.ok();
    root(
        "install -d /home/full /home/fixed && mount -t tmpfs -o size=200m,mode=1777 full /home/full \
         && mount -t tmpfs -o mode=1777 fixed /home/fixed && install -d -o alice -m 700 \
         /home/fixed/alice && mount -o remount,ro /home/fixed",
    )?;
    let check = |dir: &str| {
        Found::by(
            cluster,
            Some("n1"),
            &format!("{CHECK} --json --dir {dir} -- /bin/true"),
        )
    };
    check("/home/full/alice")?.has("ok", "store", "/home/full/alice can be written", "")?;
    // With what was saved before.
    let import = "container-checkpoint export saved@1 saved.tar && container-checkpoint import --dir \
                  /home/full/alice saved.tar";
    cluster.run_on("n1", "alice", import)?.ok()?;
    root("dd if=/dev/zero of=/home/full/fill bs=64k status=none || true")?;
    check("/home/full/alice")?.has(
        "problem",
        "room",
        "the checkpoint needs about 65.5 kB in /home/full/alice, and only 0 B are free",
        "delete something there (`container-checkpoint list`, `prune`), or name a larger store",
    )?;
    let found = check("/home/full/alice --name saved")?;
    let room = cause(&found, "room");
    ensure!(
        room.starts_with("the checkpoint needs about ")
            && room.ends_with(" MB in /home/full/alice, and only 0 B are free"),
        "{room}"
    );
    let cure =
        "delete something there (`container-checkpoint list`, `prune`), or name a larger store";
    found.has("warning", "room", &room, cure)?;
    let found = check("/home/fixed/alice")?;
    let read_only = found.findings().any(|finding| {
        let cause = finding["cause"].as_str().unwrap_or_default();
        finding["about"] == "store"
            && finding["level"] == "problem"
            && cause.starts_with("could not write /home/fixed/alice/")
            && cause.ends_with(": Read-only file system (os error 30)")
            && finding["cure"] == OTHER_STORE
    });
    ensure!(read_only && found.code == 7, "{:#}", found.document);
    root("umount /home/full /home/fixed").map(drop)
}

/// What is missing on the node for containers.
fn apptainer(cluster: &Cluster) -> Result<()> {
    let root = |script: &str| cluster.run("root", script)?.ok();
    let check = || {
        Found::by(
            cluster,
            None,
            &format!("{CHECK} --json {PYTHON} --engine criu"),
        )
    };
    let conf = "/etc/apptainer/apptainer.conf";
    root(&format!(
        "sed -i.old 's/^user bind control = yes/user bind control = no/' {conf}"
    ))?;
    check()?.has(
        "problem",
        "apptainer",
        &format!("{conf} says `user bind control = no`: nothing can be put into containers"),
        "ask the administrator for `user bind control = yes` there",
    )?;
    root(&format!(
        "mv {conf}.old {conf}; mv /dev/fuse /dev/fuse.away"
    ))?;
    let fuse = "load the kernel's module fuse and give /dev/fuse the mode 0666, or use a sandbox \
                directory as the image";
    let without = check().and_then(|found| {
        found.has(
            "warning",
            "fuse",
            "cannot use /dev/fuse: No such file or directory (os error 2); Apptainer unpacks SIF \
             images at each start",
            fuse,
        )
    });
    root("mv /dev/fuse.away /dev/fuse")?;
    without?;
    // A limit of a namespace of alice's own: the node's is the whole machine's.
    let line = format!(
        "unshare --user --map-root-user sh -c 'echo 0 > /proc/sys/user/max_user_namespaces; exec \
         {CHECK} --json {PYTHON} --dir /home/alice/.container-checkpoint'"
    );
    let cure = "set user.max_user_namespaces above 0 and, where they are there, \
                kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0 \
                (sysctl)";
    Found::by(cluster, None, &line)?.has(
        "problem",
        "userns",
        "user namespaces, which containers need, are off: /proc/sys/user/max_user_namespaces is 0",
        cure,
    )?;
    // The kernel makes none for who has another root.
    let line = format!(
        "mkdir -p root; unshare --user --mount --map-root-user sh -c 'mount --rbind / root; exec \
         chroot root {CHECK} --json {PYTHON} --dir /home/alice/.container-checkpoint'"
    );
    Found::by(cluster, None, &line)?.has(
        "problem",
        "userns",
        "user namespaces, which containers need, cannot be made: unshare: unshare failed: Operation \
         not permitted",
        cure,
    )?;
    // A container that cannot be started as it is asked for.
    let line =
        format!("{CHECK} --json {PYTHON} --engine criu --apptainer-option=--bind=/none -- true");
    let found = Found::by(cluster, None, &line)?;
    let said = cause(&found, "program");
    ensure!(
        said.starts_with("cannot look at the program in /images/python.sif: ")
            && said.ends_with("mount source /none doesn't exist"),
        "{said}"
    );
    let cure = "try it without checkpoints: apptainer exec IMAGE COMMAND";
    found.has("problem", "program", &said, cure)
}

/// A batch script as people have them; each line is there for one thing.
const SCRIPT: &str = r#"#!/bin/bash -l
#SBATCH --container-checkpoint=scripted
#SBATCH --container-checkpoint-engine=criu --container-checkpoint-dir=%h/scripted
#SBATCH --gres=gpu:1
# apptainer exec comment.sif true
set -e
echo begins $(hostname) > log
IMAGE=variable.sif
srun -n 1 --label apptainer exec first.sif true
cat > notes <<END
srun apptainer exec document.sif true
END
mkdir -p sub && echo made
cd sub
srun --container-image=inside.sif counter --steps \
    3 | tee out.log
apptainer exec ../cut.sif true && apptainer exec and.sif true
apptainer exec "$IMAGE" true; apptainer exec *.sif true
srun container-checkpoint run --name x-$SLURM_JOB_ID inside.sif none-such
singularity -q run --nv '/images/static.sif' "$@"
for n in 1 2; do apptainer exec looped.sif true; done
[ -f when.sif ] || apptainer exec unless.sif true
srun --container-image=/images/static.sif counter
case $1 in x) apptainer exec cased.sif true;; esac
make
apptainer exec made.sif true
srun apptainer exec --sharens /images/static.sif true
apptainer exec ../other.sif true
exec srun apptainer exec first.sif true
apptainer exec never.sif true
"#;

fn script(cluster: &Cluster) -> Result<()> {
    cluster.write("alice", "/home/alice/job.sh", SCRIPT)?;
    cluster
        .run("alice", "mkdir sub; cp /images/static.sif sub/inside.sif")?
        .ok()?;
    let found = Found::by(cluster, None, &format!("{CHECK} --json --script ./job.sh"))?;
    let path = "check the path: every node has to see the image there";
    let missing = |line: u32, image: &str| {
        format!(
            "line {line} of job.sh: cannot use the image {image}: No such file or directory (os error 2)"
        )
    };
    let is = |line: u32, what: &str| format!("line {line} of job.sh: {what}");
    let cut = "/home/alice/cut.sif: the container image is damaged: it has 1000000 bytes, and its data \
               goes to byte 1482752: it was cut short or written over";
    let other = "/home/alice/other.sif: the container image is made for another machine (code 05 in its \
                 header, not 02, amd64)";
    let sharens = "the option --sharens of apptainer exec cannot be combined with checkpoints: the \
                   container would be another process's, and end with it";
    let gpu = "a GPU is asked for (--nv): what an application keeps on it is not saved";
    let no_gpu = "ask for none, use it in parts of the job that are not made resumable, or let the \
                  application save its state itself";
    let lines = "lines 9, 15, 17, 17, 18, 18, 19, 20, 21, 22, 23, 26, 27, 28, 29 of job.sh start containers";
    let counter = "counter (/usr/bin/counter): static";
    let expected = [
        (
            "ok",
            "store",
            "/home/alice/scripted can be written".to_owned(),
            "",
        ),
        ("ok", "name", "nothing is saved as scripted".into(), ""),
        ("ok", "script", lines.into(), ""),
        ("problem", "image", missing(9, "first.sif"), path),
        (
            "ok",
            "image",
            is(
                15,
                "/home/alice/sub/inside.sif is a SIF file, whole by its header",
            ),
            "",
        ),
        ("ok", "program", is(15, counter), ""),
        ("problem", "image", is(17, cut), ANOTHER_IMAGE),
        (
            "problem",
            "program",
            is(19, "none-such is not found"),
            "check the command and the container image",
        ),
        (
            "ok",
            "image",
            is(20, "/images/static.sif is a SIF file, whole by its header"),
            "",
        ),
        ("warning", "gpu", is(20, gpu), no_gpu),
        (
            "ok",
            "program",
            is(20, "/.singularity.d/runscript (/bin/sh): static"),
            "",
        ),
        ("warning", "image", missing(21, "looped.sif"), path),
        ("ok", "program", is(23, counter), ""),
        ("warning", "program", is(27, sharens), "leave it out"),
        ("warning", "image", is(28, other), ANOTHER_IMAGE),
        (
            "warning",
            "gpu",
            gpu.replace("--nv", "--gres=gpu:1"),
            no_gpu,
        ),
    ];
    for (level, about, cause, cure) in &expected {
        found.has(level, about, cause, cure)?;
    }
    // And nothing else of what is in it.
    let told = found.findings().filter(|finding| {
        let about = finding["about"].as_str().unwrap_or_default();
        ["image", "program", "gpu", "script", "libraries"].contains(&about)
    });
    ensure!(told.count() == expected.len() - 2, "{:#}", found.document);

    cluster.write(
        "alice",
        "/home/alice/job.csh",
        "#!/bin/csh\napptainer exec none.sif true\n",
    )?;
    cluster.write(
        "alice",
        "/home/alice/none.sh",
        "#!/usr/bin/env bash\ntrue $(\n",
    )?;
    cluster.write("alice", "/home/alice/no.sh", "true\n")?;
    let script = |file: &str| Found::by(cluster, None, &format!("{CHECK} --json --script {file}"));
    let text = "job.csh is none of sh or bash, and is not looked into";
    script("job.csh")?.has("ok", "script", text, "")?;
    let text = "none.sh starts no container that could be seen beforehand";
    script("none.sh")?.has("ok", "script", text, "")?;
    // Without the variables of here nobody knows what it finds.
    let text = "#!/bin/sh\n#SBATCH --export=NONE\napptainer exec /images/static.sif none-such\n";
    cluster.write("alice", "/home/alice/bare.sh", text)?;
    let found = script("bare.sh")?;
    let whole = "line 3 of bare.sh: /images/static.sif is a SIF file, whole by its header";
    found.has("ok", "image", whole, "")?;
    ensure!(cause(&found, "program").is_empty(), "{:#}", found.document);
    let cure = "name the script that you give to sbatch";
    let text = "cannot use no.sh: sbatch does not take it, since it does not begin with #!";
    script("no.sh")?.has("problem", "script", text, cure)?;
    let text = "cannot use none: No such file or directory (os error 2)";
    script("none")?.has("problem", "script", text, cure)
}

/// What is known by then anyway is told by the start of an application itself.
fn at_start(cluster: &Cluster) -> Result<()> {
    let gpu = "a GPU is asked for ($SLURM_GPUS_ON_NODE): what an application keeps on it is not \
               saved; ask for none, use it in parts of the job that are not made resumable, or let \
               the application save its state itself\n";
    let run = |preflight: &str, rest: &str| {
        let config = format!("preflight: {preflight}\n");
        cluster.write("alice", "/home/alice/preflight.yaml", &config)?;
        let run = "container-checkpoint run --config preflight.yaml --name start";
        cluster.run("alice", &format!("{rest} {run} --engine criu -- echo ran"))
    };
    let warned = run("warn", "SLURM_GPUS_ON_NODE=1")?;
    let line = format!("container-checkpoint: warning: this application may not be saved: {gpu}");
    ensure!(
        warned.status.success() && warned.stdout == "ran\n" && warned.stderr.starts_with(&line),
        "{warned:?}"
    );
    let failed = run("fail", "SLURM_GPUS_ON_NODE=1")?;
    let line = format!(
        "container-checkpoint: error: start: not started, as this site wants such jobs refused \
         (`preflight: fail` in the configuration): {gpu}"
    );
    ensure!(
        failed.status.code() == Some(1)
            && failed.stdout.is_empty()
            && failed.stderr.ends_with(&line),
        "{failed:?}"
    );
    for (preflight, rest) in [("off", "SLURM_GPUS_ON_NODE=1"), ("fail", "")] {
        let said = run(preflight, rest)?;
        ensure!(
            said.stdout == "ran\n" && !said.stderr.contains("GPU"),
            "{preflight}: {said:?}"
        );
    }
    if !have("dmtcp")? {
        return Ok(());
    }
    let run = "container-checkpoint run --name uring --engine dmtcp -- ./uring";
    let said = cluster.run("alice", run)?;
    let line = format!(
        "container-checkpoint: warning: this application may not be saved: it is linked with \
         liburing.so.2: if it uses io_uring, the first checkpoint ends it; {WITHOUT_IO_URING}\n"
    );
    ensure!(
        said.status.success() && said.stderr.starts_with(&line),
        "{said:?}"
    );
    Ok(())
}

/// What an administrator sees.
fn node(cluster: &Cluster) -> Result<()> {
    let root = |script: &str| cluster.run("root", script)?.ok();
    let check = |options: &str| {
        let line = format!("{CHECK} --json --node {options}");
        Found::by(cluster, Some("n1"), &line)
    };
    let found = check("")?;
    let conf = "/etc/slurm/plugstack.conf.d/container-checkpoint.conf";
    let plugin = "/usr/lib/x86_64-linux-gnu/slurm-wlm/container_checkpoint.so";
    let version = env!("CARGO_PKG_VERSION");
    found.has(
        "ok",
        "plugin",
        &format!("{plugin} {version}, by {conf}"),
        "",
    )?;
    found.has("ok", "helper", "/usr/bin/container-checkpoint", "")?;
    found.has("ok", "proctrack", "proctrack/cgroup", "")?;
    found.has("ok", "requeue", "JobRequeue=1: jobs may be requeued", "")?;
    let yaml = "/etc/slurm/container-checkpoint.yaml";
    found.has(
        "ok",
        "config",
        &format!("no {yaml}: the defaults count"),
        "",
    )?;
    for about in ["slurm", "criu", "apptainer", "fuse", "userns"] {
        let well = found
            .findings()
            .any(|finding| finding["about"] == about && finding["level"] == "ok");
        ensure!(well, "{about}: {:#}", found.document);
    }

    cluster.write("root", yaml, "keep: 0\n")?;
    let found = check("")?;
    root(&format!("rm {yaml}"))?;
    found.has(
        "problem",
        "config",
        &format!("configuration file {yaml}, line 1, column 7: 0 is outside of 1 to 1000"),
        "correct the file: jobs that ask for checkpoints fail at their start",
    )?;

    cluster.write(
        "alice",
        "/home/alice/none.yaml",
        "dmtcp: [/nowhere]\ncriu: /nowhere/criu\n",
    )?;
    let line = format!("export PATH=/usr/bin:/bin; {CHECK} --json --node --config none.yaml");
    let found = Found::by(cluster, Some("n1"), &line)?;
    found.has(
        "problem",
        "dmtcp",
        "DMTCP is not installed: no dmtcp_launch in PATH",
        "install DMTCP 4 or name its prefix in the configuration",
    )?;
    found.has(
        "problem",
        "criu",
        "CRIU is not at /nowhere/criu, where the configuration says it is",
        "install CRIU 3.18 or newer and a kernel that it works with",
    )?;

    let line = format!("export PATH=/bare; {CHECK} --json --node");
    root("mkdir /bare; ln -s /usr/bin/container-checkpoint /bare")?;
    let found = Found::by(cluster, Some("n1"), &line)?;
    found.has(
        "problem",
        "slurm",
        "cannot run scontrol: No such file or directory (os error 2)",
        "see whether Slurm's controller runs (scontrol ping)",
    )?;
    found.has(
        "warning",
        "apptainer",
        "neither apptainer nor singularity is in PATH on this node",
        "install Apptainer, or set `apptainer` in /etc/slurm/container-checkpoint.yaml",
    )?;
    if have("dmtcp")? {
        let yaml = "criu: /nowhere/criu\n";
        cluster.write("alice", "/home/alice/nocriu.yaml", yaml)?;
        check("--config nocriu.yaml")?.has(
            "warning",
            "criu",
            "CRIU is not at /nowhere/criu, where the configuration says it is",
            "install CRIU 3.18 or newer and a kernel that it works with",
        )?;
    }

    // A plugin of another version, and a helper that is not there.
    let library = fs::read(cluster.path(plugin))?;
    let mark = format!("container-checkpoint plugin {version}\n");
    let at = library
        .windows(mark.len())
        .position(|window| window == mark.as_bytes());
    let mut other = library.clone();
    other[at.context("no version in the plugin")? + mark.len() - 2] = b'?';
    fs::write(cluster.path("/opt/container_checkpoint.so"), other)?;
    root(&format!(
        "cp {conf} /tmp/conf; echo 'optional /opt/container_checkpoint.so helper=/opt/none' > {conf}"
    ))?;
    let found = check("")?;
    root(&format!(
        "echo 'optional /opt/none/container_checkpoint.so' > {conf}"
    ))?;
    let missing = check("")?;
    root(&format!(
        "echo 'optional none/container_checkpoint.so' > {conf}"
    ))?;
    let nowhere = check("")?;
    root("mv /etc/slurm/plugstack.conf /etc/slurm/plugstack")?;
    let unread = check("")?;
    root("mv /etc/slurm/plugstack /etc/slurm/plugstack.conf")?;
    root(&format!("echo '# nothing' > {conf}"))?;
    let none = check("")?;
    root(&format!("cp /tmp/conf {conf}"))?;
    found.has(
        "problem",
        "plugin",
        &format!("the plugin that {conf} names is not of this program's version, {version}"),
        "install plugin and helper of one version on all nodes",
    )?;
    found.has(
        "problem",
        "helper",
        &format!("{conf} makes jobs start /opt/none: No such file or directory"),
        "install the helper there, or name its path with helper= in that line",
    )?;
    missing.has(
        "problem",
        "plugin",
        &format!(
            "{conf} names /opt/none/container_checkpoint.so: No such file or directory (os error 2)"
        ),
        "copy the plugin there, readable by everybody",
    )?;
    nowhere.has(
        "problem",
        "plugin",
        &format!("{conf} names none/container_checkpoint.so, which is in no PluginDir"),
        "copy the plugin into Slurm's PluginDir, or give its whole path",
    )?;
    unread.has(
        "problem",
        "plugin",
        "cannot read /etc/slurm/plugstack.conf: No such file or directory (os error 2)",
        "make the file, with the line that docs/admin-guide.md shows",
    )?;
    none.has(
        "problem",
        "plugin",
        "no line of /etc/slurm/plugstack.conf names container_checkpoint.so",
        "add the line that docs/admin-guide.md shows",
    )
}

#[test]
fn at_submission_in_slurm_22_05() -> Result<()> {
    submission(Release::OldSlurm)
}

#[test]
fn at_submission_in_slurm_24_11() -> Result<()> {
    submission(Release::Trixie)
}

#[test]
fn at_submission_in_slurm_26_05() -> Result<()> {
    submission(Release::Sid)
}

/// A helper that does not answer.
const SLOW: &str = "#!/bin/sh\nsleep 600\n";

fn submission(release: Release) -> Result<()> {
    let cluster = Cluster::start(&Spec {
        release,
        nodes: 1,
        kill_wait_s: 5,
        slurm_conf: "JobRequeue=0\n".into(),
        files: vec![File {
            path: "/opt/slow".into(),
            contents: SLOW.into(),
            mode: 0o755,
        }],
        ..spec()?
    })?;
    let line = "#!/bin/bash\n#SBATCH --gres=gpu:1\n#SBATCH --partition=normal\ntrue\n";
    cluster.write("alice", "/home/alice/job.sh", line)?;
    cluster.write("alice", "/home/alice/plain.sh", "#!/bin/bash\ntrue\n")?;
    let stack = |words: &str| {
        let path = cluster.path("/etc/slurm/plugstack.conf.d/container-checkpoint.conf");
        fs::write(path, format!("optional container_checkpoint.so {words}\n"))
    };
    let submit = |command: &str| cluster.run("alice", command);
    let (named, image) = (
        "--container-checkpoint=n",
        "--container-image=/images/none.sif",
    );
    let problem = "container-checkpoint: error: image: cannot use the image /images/none.sif: No \
                   such file or directory (os error 2); check the path: every node has to see the \
                   image there\n";

    // Off, which is the default.
    let off = submit(&format!("sbatch -H {named} {image} plain.sh"))?;
    ensure!(off.status.success() && off.stderr.is_empty(), "{off:?}");

    stack("preflight=warn")?;
    let warned = submit(&format!("sbatch -H {named} {image} plain.sh"))?;
    ensure!(
        warned.status.success() && warned.stderr.starts_with(problem),
        "{warned:?}"
    );
    let time = format!(
        "container-checkpoint: warning: time: a pre-empted job has 5.0 s (KillWait 5.0 s): not \
         enough for any but the smallest applications; {MORE_TIME}\n"
    );
    ensure!(warned.stderr.contains(&time), "{warned:?}");
    let requeue = "container-checkpoint: warning: requeue: jobs are not requeued here unless they \
                   say so (JobRequeue=0); submit with --requeue\n";
    ensure!(warned.stderr.contains(requeue), "{warned:?}");
    let node = Found::by(&cluster, None, &format!("{CHECK} --json --node"))?;
    let cause = "JobRequeue=0: only jobs that say --requeue can go on by themselves";
    let cure = "set JobRequeue=1 in slurm.conf";
    node.has("warning", "requeue", cause, cure)?;
    if release == Release::Trixie {
        predicted(&cluster)?;
    }
    // What does not ask is not checked.
    let plain = submit("sbatch -H plain.sh")?;
    ensure!(
        plain.status.success() && plain.stderr.is_empty(),
        "{plain:?}"
    );

    stack("preflight=fail")?;
    let refused = "container-checkpoint: it is not submitted, as this site wants such jobs refused \
                   (preflight=fail in plugstack.conf)\n";
    for command in ["sbatch -H", "srun", "salloc"] {
        let said = submit(&format!("{command} {named} {image} ./plain.sh"))?;
        ensure!(
            said.status.code() == Some(1)
                && said.stdout.is_empty()
                && said.stderr.starts_with(problem)
                && said.stderr.ends_with(refused),
            "{command}: {said:?}"
        );
    }
    // Warnings refuse nothing; the script's own lines are seen.
    let gpu = "container-checkpoint: warning: gpu: a GPU is asked for (--gres=gpu:1): what an \
               application keeps on it is not saved; ask for none";
    let warned = submit(&format!("sbatch --test-only {named} job.sh"))?;
    ensure!(warned.stderr.contains(gpu), "{warned:?}");
    let grace = submit(&format!("sbatch -H -p grace --requeue {named} plain.sh"))?;
    ensure!(
        grace.status.success() && !grace.stderr.contains(" time: "),
        "{grace:?}"
    );
    let image_on_batch = "--container-image=/images/static.sif";
    let late = submit(&format!(
        "sbatch -H -p grace {named} {image_on_batch} plain.sh"
    ))?;
    let time = "container-checkpoint: warning: time: a pre-empted job has 5.0 s (KillWait 5.0 s, \
                GraceTime 15.0 s of grace, of which the batch step hears late): not enough for";
    ensure!(late.stderr.contains(time), "{late:?}");
    // A step of a job is none of this: its own start tells. What the script says of it is seen.
    let step = format!("sbatch --parsable -W -o step.out {named} steps.sh");
    let script = "#!/bin/bash\ncd $SLURM_SUBMIT_DIR\n\nsrun -n 1 --container-image=none.sif true\n";
    cluster.write("alice", "/home/alice/steps.sh", script)?;
    let missing = "cannot use the image none.sif: No such file or directory (os error 2); check the \
                   path: every node has to see the image there\n";
    for (command, place) in [
        ("steps.sh", "line 4 of steps.sh"),
        ("--wrap 'srun --container-image none.sif true'", "--wrap"),
    ] {
        let said = submit(&format!("sbatch -H {named} {command}"))?;
        let problem = format!("container-checkpoint: error: image: {place}: {missing}");
        ensure!(
            said.status.code() == Some(1)
                && said.stderr.contains(&problem)
                && said.stderr.ends_with(refused),
            "{said:?}"
        );
    }
    // Somewhere else there is one.
    cluster
        .run(
            "alice",
            "mkdir -p sub && cp /images/static.sif sub/none.sif",
        )?
        .ok()?;
    let script = script.replace("cd $SLURM_SUBMIT_DIR", "");
    cluster.write("alice", "/home/alice/steps.sh", &script)?;
    let said = submit(&format!("sbatch -H --chdir sub {named} steps.sh"))?;
    ensure!(
        said.status.success() && !said.stderr.contains("none.sif"),
        "{said:?}"
    );
    let script = format!("#!/bin/bash\nIMAGE={image}\nsrun $IMAGE true\n");
    cluster.write("alice", "/home/alice/steps.sh", &script)?;
    submit(&step)?;
    let said = fs::read_to_string(cluster.path("/home/alice/step.out"))?;
    ensure!(
        said.contains("/images/none.sif") && !said.contains("preflight"),
        "{said}"
    );
    if release != Release::OldSlurm {
        programs_at_submission(&cluster)?;
    }

    // A helper that is missing, fails or hangs keeps nobody from submitting.
    let mut helpers = vec![
        ("/opt/none", ""),
        (
            "/bin/false",
            "this job was not checked beforehand: the check ended with exit status: 1",
        ),
    ];
    if release == Release::Sid {
        let told = "this job was not checked beforehand: the check took more than 10 s";
        helpers.push(("/opt/slow", told));
    }
    for (helper, told) in helpers {
        stack(&format!("preflight=fail helper={helper}"))?;
        let said = submit(&format!("sbatch -H {named} plain.sh"))?;
        ensure!(
            said.status.success() && said.stderr.trim_end().ends_with(told),
            "{helper}: {said:?}"
        );
        ensure!(
            said.stderr.is_empty() == told.is_empty(),
            "{helper}: {said:?}"
        );
    }
    let left = cluster.run("root", "pgrep -x sleep -u alice")?;
    ensure!(left.stdout.is_empty(), "the slow helper is left: {left:?}");
    Ok(())
}

/// What takes longer to save than a job has.
fn predicted(cluster: &Cluster) -> Result<()> {
    let script = "echo 'safety: 10' > safe.yaml
        container-checkpoint run --name large --engine criu /images/python.sif python3 -c \"import os, time
memory = os.urandom(500 << 20)
open('large.ready', 'w')
time.sleep(600)\" &
        until [ -e large.ready ]; do sleep 0.1; done
        container-checkpoint save large --stop --wait
        wait";
    cluster.run("alice", script)?.ok()?;
    let line = format!("{CHECK} --json --config safe.yaml --name large");
    let found = Found::by(cluster, None, &line)?;
    let time = cause(&found, "time");
    ensure!(
        time.starts_with("a checkpoint like the last (")
            && time.contains(") may need ")
            && time.ends_with(", and a pre-empted job has 5.0 s (KillWait 5.0 s)"),
        "{time}"
    );
    found.has("warning", "time", &time, MORE_TIME)
}

/// The script's interpreter in the image, where Apptainer is on the login node.
fn programs_at_submission(cluster: &Cluster) -> Result<()> {
    let (named, image) = (
        "--container-checkpoint=n",
        "--container-image=/images/static.sif",
    );
    cluster.write("alice", "/home/alice/perl.sh", "#!/usr/bin/perl\n")?;
    let said = cluster.run("alice", &format!("sbatch -H {named} {image} perl.sh"))?;
    let problem = "container-checkpoint: error: program: /usr/bin/perl is not found; check the \
                   command and the container image\n";
    ensure!(
        said.status.code() == Some(1) && said.stderr.contains(problem),
        "{said:?}"
    );
    // Those of a script's lines, and how long that takes.
    let script = "#!/bin/bash\nsrun apptainer exec /images/static.sif no-such\n\
                  apptainer exec /images/python.sif python3 x.py | \\\n\
                  apptainer exec --cleanenv /images/python.sif python3 \"$1\"\nmake\n\
                  apptainer exec /images/static.sif neither\n";
    cluster.write("alice", "/home/alice/lines.sh", script)?;
    let begun = Instant::now();
    let said = cluster.run("alice", &format!("sbatch -H {named} lines.sh"))?;
    let took = begun.elapsed();
    let problem = "container-checkpoint: error: program: line 2 of lines.sh: no-such is not found; \
                   check the command and the container image\n";
    ensure!(
        said.status.code() == Some(1)
            && said.stderr.contains(problem)
            && !said.stderr.contains("neither")
            && !said.stderr.contains("was not checked"),
        "{said:?}"
    );
    eprintln!("a submission with three containers took {took:?}");
    if !have("dmtcp")? {
        return Ok(());
    }
    cluster.write("alice", "/home/alice/sh.sh", "#!/bin/sh\n")?;
    let engine = "--container-checkpoint-engine=dmtcp";
    let said = cluster.run(
        "alice",
        &format!("sbatch -H {named} {image} {engine} sh.sh"),
    )?;
    let problem = "container-checkpoint: error: engine: DMTCP cannot hold /bin/sh: it is linked \
                   statically; use --container-checkpoint-engine=criu\n";
    if said.status.code() != Some(1) || !said.stderr.contains(problem) {
        bail!("{said:?}");
    }
    Ok(())
}

#[test]
fn documentation_names_every_finding() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = fs::read_to_string(root.join("docs/user-guide.md"))?
        + &fs::read_to_string(root.join("docs/admin-guide.md"))?;
    let mut words = Vec::new();
    for file in fs::read_dir(root.join("helper/commands/check"))? {
        let source = fs::read_to_string(file?.path())?;
        let flat: Vec<&str> = source.split_whitespace().collect();
        for part in flat.join(" ").split("Of::").skip(1) {
            let quoted = part.split('"').nth(1).unwrap_or_default();
            words.push(quoted.to_owned());
        }
    }
    words.retain(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()) && !word.is_empty());
    words.sort();
    words.dedup();
    ensure!(words.len() > 16, "{words:?}");
    for word in words {
        ensure!(
            text.contains(&format!("`{word}`")),
            "`{word}` is not in the documentation"
        );
    }
    Ok(())
}
