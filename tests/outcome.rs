//! What users, Slurm and other users see of a wrapped job besides its resume: how it ends, its
//! streams and signals, what is left of it, who else can touch it. Both engines side by side on one
//! cluster; each case has checkpoint names of its own.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use lab::{Cluster, Job, Process, Release, Spec};
use support::*;

const IMAGE: &str = "/images/python.sif";

/// Says what it gets: its signals, and where it is.
const SIGNALS: &str = r#"import os, signal, sys
def got(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    if number == signal.SIGHUP:
        sys.exit(3)
for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, got)
print("ready", flush=True)
while True:
    signal.pause()
"#;

/// Copies standard input to standard output, and says so on standard error.
const COPY: &str = r#"import sys
sys.stderr.write("copying\n")
data = sys.stdin.buffer.read()
sys.stdout.buffer.write(data)
sys.stdout.buffer.flush()
sys.stderr.write("copied %d\n" % len(data))
"#;

/// Waits for a child only long after it has ended.
const CHILD: &str = r#"import os, sys, time
child = os.fork()
if child == 0:
    os._exit(3)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
print("ended", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
try:
    print("child: %d" % (os.waitpid(child, 0)[1] >> 8))
except ChildProcessError:
    print("child: forgotten")
"#;

/// Needs tens of MB of stack, far more than the usual limit.
const DEEP: &str = r#"import os, sys, time
sys.setrecursionlimit(10**7)
deep = []
for _ in range(60000):
    deep = [deep]
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("deep: %d" % len(repr(deep)), flush=True)
os._exit(0)
"#;

/// Lets its heap grow: pieces that Python takes from malloc, and malloc not from mmap.
const HEAP: &str = r#"import os, sys, time
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("heap: %d" % sum(len(bytes(1000)) for piece in [bytes(1000) for _ in range(100000)]))
"#;

/// Connects to everything that listens on this node's addresses and, told as DMTCP's own command
/// would, asks it to end its computation; tries everything that a path or an abstract name leads to.
const ATTACK: &str = r#"import os, socket, struct, sys
store, pids = sys.argv[1], sys.argv[2:]
done = []
def command(letter):
    # DMTCP's DmtcpMessage: magic, size at 88, type 15 (a user's command) at 96, command at 172+.
    message = bytearray(208)
    message[0:14] = b"DMTCP_CKPT_V0\n"
    struct.pack_into("<I", message, 88, 208)
    struct.pack_into("<I", message, 96, 15)
    struct.pack_into("<I", message, 176, ord(letter))
    return bytes(message)
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).read().splitlines()[1:]:
        words = line.split()
        if words[3] != "0A" or words[7] != "1001":
            continue
        done.append("port")
        port = int(words[1].rsplit(":", 1)[1], 16)
        for letter in "ckq":
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as peer:
                    peer.sendall(command(letter))
                    peer.settimeout(5)
                    answer = peer.recv(4096)
                    if answer:
                        print("BREACH: port", port, "answers", answer[:120])
            except OSError as why:
                pass
for line in open("/proc/net/unix").read().splitlines()[1:]:
    words = line.split(None, 7)
    if len(words) < 8 or not words[7].startswith("@"):
        continue
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as peer:
            try:
                peer.connect("\0" + words[7][1:])
            except OSError:
                continue
            if "munge" not in words[7]:
                print("BREACH: abstract socket", words[7])
def refused(what, attempt):
    try:
        attempt()
    except PermissionError:
        done.append(what)
    except OSError as why:
        print("UNCLEAR:", what, why)
    else:
        print("BREACH:", what)
refused("store", lambda: os.listdir(store))
refused("write", lambda: open(store + "/x", "w"))
for pid in pids:
    refused("kill", lambda: os.kill(int(pid), 0))
    refused("memory", lambda: open("/proc/%s/mem" % pid, "rb"))
    refused("root", lambda: os.listdir("/proc/%s/root/" % pid))
    refused("fd", lambda: os.listdir("/proc/%s/fd" % pid))
    refused("environ", lambda: open("/proc/%s/environ" % pid).read())
print("tried", *sorted(set(done)))
"#;

type Case = fn(&Site) -> Result<()>;

/// The shared cluster as one engine's cases see it.
struct Site<'a> {
    cluster: &'a Cluster,
    engine: &'static str,
}

#[test]
fn outcomes_with_both_engines() -> Result<()> {
    let cluster = &with(&Spec {
        cpus: 16,
        slurm_conf: "LaunchParameters=use_interactive_step\n".into(),
        ..spec()?
    })?;
    cluster
        .run("root", "install -d -m 1777 /home/shared")?
        .ok()?;
    for (name, text) in [
        ("signals.py", SIGNALS),
        ("copy.py", COPY),
        ("child.py", CHILD),
        ("deep.py", DEEP),
        ("heap.py", HEAP),
    ] {
        cluster.write("alice", format!("/home/alice/{name}"), text)?;
    }
    cluster.write("bob", "/home/bob/attack.py", ATTACK)?;
    let cases: &[(&str, Case)] = &[
        ("fresh batch ends", |site| ends(site, false)),
        ("fresh steps' ends", |site| ends(site, true)),
        ("resumed batch: 7", |site| resumed(site, false, "7")),
        ("resumed batch: SEGV", |site| resumed(site, false, "SEGV")),
        ("resumed step: 0", |site| resumed(site, true, "0")),
        ("resumed step: SEGV", |site| resumed(site, true, "SEGV")),
        ("signals to a batch container", signals_batch),
        ("signals to a step", signals_step),
        ("streams", streams),
        ("same name", same_name),
        ("other users", other_users),
        ("completed", completed),
        ("srun alone", srun_alone),
        ("salloc", salloc),
        ("run in a batch script", run_in_batch),
        ("run outside of Slurm", run_outside),
        ("an ended child", ended_child),
        ("an unlimited stack", unlimited_stack),
        ("a heap that grows", growing_heap),
    ];
    let mut failed = Vec::new();
    for engine in ["criu", "dmtcp"] {
        if !have(engine)? {
            continue;
        }
        failed.extend(parallel(cases, &Site { cluster, engine }));
    }
    if let Err(error) = untouched(cluster) {
        failed.push(format!("untouched: {error:#}"));
    }
    if let Err(error) = cluster.wait_nothing_left(Duration::from_secs(20)) {
        failed.push(format!("{error:#}"));
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

/// Runs the cases, a few at a time; what failed.
fn parallel(cases: &[(&str, Case)], site: &Site) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failed = Vec::new();
        while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let started = Instant::now();
            if let Err(error) = case(site) {
                failed.push(format!("{}: {name}: {error:#}", site.engine));
            }
            let took = started.elapsed().as_secs_f32();
            println!("{}: {name}: {took:.1} s", site.engine);
        }
        failed
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..6).map(|_| scope.spawn(work)).collect();
        let failed = workers.into_iter().map(|worker| worker.join());
        failed
            .flat_map(|failed| failed.unwrap_or_else(|_| vec!["a case panicked".into()]))
            .collect()
    })
}

impl Site<'_> {
    /// A checkpoint name of this engine's.
    fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.engine)
    }

    /// Submits lines.py as a batch container, or as a step of a script on the host, and with it the
    /// gate it waits for. Its output is added to `name.out`.
    fn lines(&self, name: &str, step: bool, how: &str, more: &[&str]) -> Result<u32> {
        let mut options = options(self.engine, name);
        options.extend(more.iter().map(|&word| word.to_owned()));
        let script = if step {
            format!(
                "#!/bin/bash\nsrun --container-image={IMAGE} python3 lines.py {name}.gate {how}\n\
                 code=$?\necho \"after: $code\"\nexit $code\n"
            )
        } else {
            options.push(format!("--container-image={IMAGE}"));
            format!("#!/bin/bash\nexec python3 lines.py {name}.gate {how}\n")
        };
        sbatch(self.cluster, &options, &script)
    }

    fn end(&self, name: &str, job: u32) -> Result<Job> {
        explained(self.cluster, name, self.cluster.wait_end(job, LIMIT))
    }

    fn said(&self, name: &str, what: &str) -> Result<()> {
        let text = output(self.cluster, name)?;
        let said: Vec<&str> = text
            .lines()
            .filter(|line| line.parse::<u64>().is_err())
            .collect();
        ensure!(
            said.iter().any(|line| line.contains(what)),
            "{name} did not say {what:?} but:\n{}",
            said.join("\n")
        );
        Ok(())
    }

    fn cancel(&self, name: &str, job: u32) -> Result<()> {
        self.run(&format!("scancel {job}"))?;
        let end = self.end(name, job)?;
        ensure!(end["JobState"] == "CANCELLED", "{name}: {end:?}");
        Ok(())
    }

    /// Runs a line of shell as alice, which has to succeed; what it printed.
    fn run(&self, script: &str) -> Result<String> {
        let output = self.cluster.run("alice", script)?;
        output.ok().with_context(|| script.to_owned())
    }

    /// Words of srun and salloc.
    fn srun_options(&self, name: &str) -> String {
        format!(
            "--container-checkpoint={name} --container-checkpoint-engine={}",
            self.engine
        )
    }
}

/// Slurm's ExitCode of an application that ended as `how` says; as a script hands it on that has
/// it as a step.
fn exit_code(how: &str, step: bool) -> &'static str {
    match (how, step) {
        ("0", _) => "0:0",
        ("7", _) => "7:0",
        ("SEGV", true) => "139:0",
        _ => "0:11",
    }
}

fn ends(site: &Site, step: bool) -> Result<()> {
    let kind = if step { "step" } else { "batch" };
    let mut jobs = Vec::new();
    for how in ["0", "7", "SEGV"] {
        let name = site.name(&format!("fresh-{kind}-{how}"));
        open_gate(site.cluster, &name)?;
        jobs.push((how, site.lines(&name, step, how, &[])?, name));
    }
    for (how, job, name) in jobs {
        let end = site.end(&name, job)?;
        let result = (|| {
            ensure!(end["ExitCode"] == exit_code(how, step), "{end:?}");
            let state = if how == "0" { "COMPLETED" } else { "FAILED" };
            ensure!(end["JobState"] == state, "{end:?}");
            if step && how == "SEGV" {
                site.said(&name, "Segmentation fault")?;
            }
            exact(&output(site.cluster, &name)?)
        })();
        explained(site.cluster, &name, result.context(name.clone()))?;
    }
    Ok(())
}

/// scancel leaves a saved state; the next job with that name goes on from it and ends as the
/// application does.
fn resumed(site: &Site, step: bool, how: &str) -> Result<()> {
    let kind = if step { "step" } else { "batch" };
    let name = site.name(&format!("resumed-{kind}-{how}"));
    let first = site.lines(&name, step, how, &[])?;
    let result = (|| {
        wait_progress(site.cluster, &name, 20)?;
        site.cancel(&name, first)?;
        gone(site, first)?;
        open_gate(site.cluster, &name)?;
        let second = site.lines(&name, step, how, &[])?;
        let end = site.end(&name, second)?;
        site.said(&name, "goes on from generation 1")?;
        // What scancel is, in the words of triggers.
        site.said(&name, "s, exit-request)")?;
        ensure!(end["ExitCode"] == exit_code(how, step), "{end:?}");
        let text = output(site.cluster, &name)?;
        if step {
            let code = exit_code(how, step).trim_end_matches(":0");
            ensure!(text.contains(&format!("after: {code}\n")), "{text}");
            ensure!(text.matches("after:").count() == 1, "{text}");
        }
        exact(&text)
    })();
    explained(site.cluster, &name, result)
}

/// That no process of a job is left, and nobody holds a lock.
fn gone(site: &Site, job: u32) -> Result<()> {
    let left: Vec<String> = processes_of(site.cluster, job)
        .iter()
        .map(Process::to_string)
        .collect();
    ensure!(left.is_empty(), "left of job {job}: {}", left.join("\n"));
    let locks = site.run(&format!(
        "find .container-checkpoint -name lock -exec grep -l '\"job\": {job},' {{}} +; true"
    ))?;
    ensure!(locks.is_empty(), "job {job} has left {locks}");
    Ok(())
}

/// The processes with a job's id in their environment.
fn processes_of(cluster: &Cluster, job: u32) -> Vec<Process> {
    let variable = format!("SLURM_JOB_ID={job}\0");
    let mut all = cluster.processes();
    all.retain(|process| {
        std::fs::read(cluster.path(format!("/proc/{}/environ", process.pid))).is_ok_and(|text| {
            text.windows(variable.len())
                .any(|window| window == variable.as_bytes())
        })
    });
    all
}

fn signals_batch(site: &Site) -> Result<()> {
    let name = site.name("signals-batch");
    let mut options = options(site.engine, &name);
    options.push(format!("--container-image={IMAGE}"));
    let script = "#!/bin/bash\nexec python3 signals.py\n";
    let job = sbatch(site.cluster, &options, script)?;
    signals(site, &name, job, "scancel --batch")
}

fn signals_step(site: &Site) -> Result<()> {
    let name = site.name("signals-step");
    let script = format!(
        "#!/bin/bash\nsrun --container-image={IMAGE} python3 signals.py\n\
         code=$?\necho \"after: $code\"\nexit $code\n"
    );
    let job = sbatch(site.cluster, &options(site.engine, &name), &script)?;
    signals(site, &name, job, "scancel")
}

fn signals(site: &Site, name: &str, job: u32, scancel: &str) -> Result<()> {
    let path = format!("/home/alice/{name}.out");
    let wait = |line: &str| {
        site.cluster
            .wait_file(&path, LIMIT, |text| text.lines().any(|l| l == line))
    };
    let result = (|| {
        wait("ready")?;
        for signal in ["USR1", "INT", "HUP"] {
            site.run(&format!("{scancel} --signal={signal} {job}"))?;
            wait(&format!("got SIG{signal}"))?;
        }
        let end = site.end(name, job)?;
        ensure!(end["ExitCode"] == "3:0", "{end:?}");
        let text = output(site.cluster, name)?;
        ensure!(text.matches("got ").count() == 3, "{text}");
        Ok(())
    })();
    explained(site.cluster, name, result)
}

fn streams(site: &Site) -> Result<()> {
    let name = site.name("streams");
    let (input, out, err) = (
        format!("{name}.in"),
        format!("{name}.copy"),
        format!("{name}.err"),
    );
    // Every byte, in an order that no line discipline survives, and more than a pipe holds.
    let script = format!(
        "python3 -c 'import sys; sys.stdout.buffer.write(bytes(i * i % 256 for i in range(300007)) + bytes(range(256)))' >{input} && \
         srun --quiet {} --container-image={IMAGE} python3 copy.py <{input} >{out} 2>{err} && \
         cmp {input} {out} && grep -v ^container-checkpoint: {err}",
        site.srun_options(&name),
    );
    let said = site.run(&script);
    let said = said.map_err(|error| {
        let text = site.run(&format!("ls -l {name}.*; cat {err}"));
        anyhow!("{error:#}\n{text:?}")
    })?;
    ensure!(said == "copying\ncopied 300263\n", "{said}");
    Ok(())
}

fn same_name(site: &Site) -> Result<()> {
    let name = site.name("same");
    let first = site.lines(&name, false, "0", &[])?;
    wait_progress(site.cluster, &name, 5)?;
    let other = format!("--output={name}-2.out");
    let second = site.lines(&name, false, "0", &[&other])?;
    let end = site.end(&format!("{name}-2"), second)?;
    ensure!(end["ExitCode"] == "1:0", "{end:?}");
    let held = format!("{name} is in use by job {first} (step batch, run 0) on n");
    site.said(&format!("{name}-2"), &held)?;
    // And another process of the same user.
    let run = site.cluster.run(
        "alice",
        &format!("container-checkpoint run --name {name} {IMAGE} true"),
    )?;
    ensure!(
        run.status.code() == Some(1) && run.stderr.matches(&held).count() == 1,
        "{run:?}"
    );
    wait_progress(site.cluster, &name, 5)?;
    open_gate(site.cluster, &name)?;
    let end = site.end(&name, first)?;
    ensure!(end["JobState"] == "COMPLETED", "{end:?}");
    exact(&output(site.cluster, &name)?)
}

fn other_users(site: &Site) -> Result<()> {
    let name = site.name("alices");
    let store = format!("/home/shared/{name}");
    // Not in the home directory, which hides everything.
    let dir = format!("--container-checkpoint-dir={store}");
    let job = site.lines(&name, false, "0", &[&dir])?;
    let result = (|| {
        let node = node(site.cluster, job)?;
        wait_progress(site.cluster, &name, 5)?;
        let of_job = processes_of(site.cluster, job);
        ensure!(!of_job.is_empty(), "no process of job {job} is seen");
        // Process ids as the node counts them.
        let pids: Vec<String> = of_job
            .iter()
            .filter_map(|process| on_node(site.cluster, process.pid))
            .collect();
        let attack = format!("python3 attack.py {store} {}", pids.join(" "));
        let said = site.cluster.run_on(&node, "bob", &attack)?.ok()?;
        ensure!(
            !said.contains("BREACH") && !said.contains("UNCLEAR"),
            "{said}"
        );
        for what in ["store", "write", "kill", "memory", "root", "fd", "environ"] {
            ensure!(said.contains(what), "{said}");
        }
        if site.engine == "dmtcp" {
            ensure!(said.contains("port"), "no coordinator was found: {said}");
            // What it exits with tells nothing: that the job goes on unsaved does, below.
            let ports = "for port in $(awk '$4 == \"0A\" && $8 == 1001 { sub(/.*:/, \"\", $2); \
                         print $2 }' /proc/net/tcp); do \
                         for ask in --kcheckpoint --kill --quit --checkpoint; do \
                         timeout 10 dmtcp_command --coord-host 127.0.0.1 \
                         --coord-port $((0x$port)) $ask; echo \"$ask: $?\"; done; done";
            let said = site.cluster.run_on(&node, "bob", ports)?;
            ensure!(said.stdout.contains("--kill: "), "{said:?}");
        }
        for command in [
            format!("scancel {job}"),
            format!("scontrol requeue {job}"),
            format!("container-checkpoint run --name {name} --dir {store} -- true"),
        ] {
            let run = site.cluster.run("bob", &command)?;
            ensure!(!run.status.success(), "bob: {command}: {run:?}");
        }
        wait_progress(site.cluster, &name, 5)?;
        open_gate(site.cluster, &name)?;
        let end = site.end(&name, job)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        ensure!(
            !site
                .cluster
                .path(&store)
                .join(&name)
                .join("latest")
                .exists(),
            "bob has made alice's job save itself"
        );
        exact(&output(site.cluster, &name)?)
    })();
    explained(site.cluster, &name, result)
}

/// The number that a node gives to a process that the login host knows as `pid`.
fn on_node(cluster: &Cluster, pid: i32) -> Option<String> {
    let status = std::fs::read_to_string(cluster.path(format!("/proc/{pid}/status"))).ok()?;
    // The login host's number, the node's, and perhaps one of a container.
    let chain = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    let numbers: Vec<&str> = chain.split_whitespace().collect();
    let own = numbers
        .iter()
        .position(|number| *number == pid.to_string())?;
    numbers.get(own + 1).map(|number| number.to_string())
}

fn completed(site: &Site) -> Result<()> {
    let name = site.name("completed");
    open_gate(site.cluster, &name)?;
    for said in ["starts under", "was completed; starting anew"] {
        let log = format!("--output={name}.out");
        let job = site.lines(&name, false, "0", &["--open-mode=truncate", &log])?;
        let end = site.end(&name, job)?;
        ensure!(end["JobState"] == "COMPLETED", "{end:?}");
        site.said(&name, said)?;
        exact(&output(site.cluster, &name)?)?;
    }
    Ok(())
}

fn srun_alone(site: &Site) -> Result<()> {
    from_the_login_shell(site, "srun")
}

fn salloc(site: &Site) -> Result<()> {
    from_the_login_shell(site, "salloc")
}

/// A job without a script: ended, and gone on from by another one.
fn from_the_login_shell(site: &Site, how: &str) -> Result<()> {
    let name = site.name(how);
    let options = site.srun_options(&name);
    let command = format!("--container-image={IMAGE} python3 lines.py {name}.gate 7");
    let whole = match how {
        "srun" => format!("exec srun --job-name={name} {options} {command}"),
        _ => format!("exec salloc --job-name={name} {options} srun {command}"),
    };
    let whole = format!("{whole} >>{name}.out 2>&1");
    let cluster = site.cluster;
    let result = std::thread::scope(|scope| {
        let first = scope.spawn(|| cluster.run("alice", &whole));
        let job = (|| {
            wait_progress(cluster, &name, 20)?;
            let list = format!("squeue --noheader --format=%i --name={name}");
            let job = site.run(&list)?.trim().to_owned();
            site.run(&format!("scancel {job}"))?;
            Ok::<_, anyhow::Error>(job)
        })();
        let first = first.join().map_err(|_| anyhow!("a thread panicked"))?;
        let job: u32 = job?.parse()?;
        first?;
        cluster.wait_end(job, LIMIT)?;
        gone(site, job)?;
        open_gate(cluster, &name)?;
        let second = cluster.run("alice", &whole)?;
        site.said(&name, "goes on from generation 1")?;
        ensure!(second.status.code() == Some(7), "{second:?}");
        exact(&output(cluster, &name)?)
    });
    explained(cluster, &name, result)
}

fn run_in_batch(site: &Site) -> Result<()> {
    let name = site.name("run-in-batch");
    // Nobody wraps the script, so that scancel takes srun away while the step still writes: what srun
    // had not written by then has to come in the next job.
    let script = format!(
        "#!/bin/bash\nsrun container-checkpoint run --name {name} --engine {} {IMAGE} \
         python3 lines.py {name}.gate 7\ncode=$?\necho \"after: $code\"\nexit $code\n",
        site.engine
    );
    let log = format!("--output={name}.out");
    let submit = || {
        let args = [log.as_str(), "--open-mode=append"];
        site.cluster.sbatch("alice", &args, &script)
    };
    let result = (|| {
        let first = submit()?;
        wait_progress(site.cluster, &name, 20)?;
        site.cancel(&name, first)?;
        gone(site, first)?;
        open_gate(site.cluster, &name)?;
        let end = site.end(&name, submit()?)?;
        ensure!(end["ExitCode"] == "7:0", "{end:?}");
        site.said(&name, "goes on from generation 1")?;
        exact(&output(site.cluster, &name)?)
    })();
    explained(site.cluster, &name, result)
}

fn run_outside(site: &Site) -> Result<()> {
    let name = site.name("outside");
    let command = format!(
        "container-checkpoint run --name {name} --engine {} {IMAGE} python3 lines.py {name}.gate \
         7 >>{name}.out 2>&1",
        site.engine
    );
    // The helper is a child of the shell, which says its number.
    let script = format!("{command} & echo $! >{name}.pid; wait $!");
    let cluster = site.cluster;
    let result = std::thread::scope(|scope| {
        let first = scope.spawn(|| cluster.run("alice", &script));
        let ended = wait_progress(cluster, &name, 20)
            .and_then(|_| site.run(&format!("kill $(cat {name}.pid)")));
        let first = first.join().map_err(|_| anyhow!("a thread panicked"))??;
        ended?;
        ensure!(first.status.code() == Some(128 + 15), "{first:?}");
        open_gate(cluster, &name)?;
        let second = cluster.run("alice", &command)?;
        ensure!(second.status.code() == Some(7), "{second:?}");
        site.said(&name, "goes on from generation 1")?;
        exact(&output(cluster, &name)?)
    });
    explained(cluster, &name, result)
}

/// How a child ended that is not waited for: CRIU keeps it, DMTCP does not, and that is said.
fn ended_child(site: &Site) -> Result<()> {
    let name = site.name("child");
    let text = saved_outside(site, &name, "ended", "python3 child.py")?;
    let warned = text.contains("does not hold how python3 (process ");
    let child = match site.engine {
        "criu" => "child: 3",
        _ => "child: forgotten",
    };
    ensure!(text.lines().any(|line| line == child), "{text}");
    ensure!(warned == (site.engine == "dmtcp"), "{text}");
    Ok(())
}

/// What a script in the container has set is so after a restart.
fn unlimited_stack(site: &Site) -> Result<()> {
    let name = site.name("stack");
    let command = "bash -c 'ulimit -s unlimited; exec python3 deep.py $0'";
    let text = saved_outside(site, &name, "ready", command)?;
    ensure!(text.lines().any(|line| line == "deep: 120002"), "{text}");
    Ok(())
}

/// A program's heap grows after a restart, also where it is below everything else: there it is
/// without randomization, and by chance else.
fn growing_heap(site: &Site) -> Result<()> {
    let name = site.name("heap");
    let text = saved_outside(site, &name, "ready", "setarch -R python3 heap.py")?;
    let grown = text.lines().any(|line| line == "heap: 100000000");
    ensure!(grown, "{text}");
    Ok(())
}

/// Runs `command`, which gets a gate, outside of Slurm; saves and stops it once it has said `ready`,
/// and lets it go on to its end. What was said in both runs.
fn saved_outside(site: &Site, name: &str, ready: &str, command: &str) -> Result<String> {
    let command = format!(
        "container-checkpoint run --name {name} --engine {} {IMAGE} {command} {name}.gate \
         >>{name}.out 2>&1",
        site.engine
    );
    let cluster = site.cluster;
    let result = std::thread::scope(|scope| {
        let first = scope.spawn(|| cluster.run("alice", &command));
        let path = format!("/home/alice/{name}.out");
        let saved = cluster
            .wait_file(&path, LIMIT, |text| text.lines().any(|line| line == ready))
            .and_then(|_| site.run(&format!("container-checkpoint save {name} --stop --wait")));
        first.join().map_err(|_| anyhow!("a thread panicked"))??;
        saved?;
        open_gate(cluster, name)?;
        cluster.run("alice", &command)?.ok()?;
        output(cluster, name)
    });
    explained(cluster, name, result)
}

/// A job without the option has nothing of ours in it.
fn untouched(cluster: &Cluster) -> Result<()> {
    let script =
        "#!/bin/bash\nenv\nps -o args= -p $PPID\nsrun env\nsrun sh -c 'ps -o args= -p $PPID'\n";
    let job = cluster.sbatch("alice", &["--output=untouched.out"], script)?;
    let end = cluster.wait_end(job, LIMIT)?;
    let text = output(cluster, "untouched")?;
    ensure!(end["ExitCode"] == "0:0", "{end:?}\n{text}");
    ensure!(!text.to_lowercase().contains("checkpoint"), "{text}");
    for step in ["batch", "1"] {
        let line = format!("slurmstepd: [{job}.{step}]");
        ensure!(text.lines().any(|l| l == line), "{text}");
    }
    Ok(())
}

#[test]
fn slurm_22_05_preempts_and_goes_on() -> Result<()> {
    release(Release::OldSlurm)
}

#[test]
fn slurm_26_05_preempts_and_goes_on() -> Result<()> {
    release(Release::Sid)
}

/// A batch container and a step, one of each engine where both are there, pre-empted at once.
/// (Slurm 24.11 is what all other tests run.)
fn release(release: Release) -> Result<()> {
    let cluster = with(&Spec { release, ..spec()? })?;
    let script = "#!/bin/bash\napptainer exec /images/python.sif true\n";
    let job = sbatch(&cluster, &options("criu", "stage"), script)?;
    cluster.wait_end(job, LIMIT)?;
    let said = output(&cluster, "stage")?;
    ensure!(said.contains("stage/1 starts under criu"), "{said}");
    let mut sites = vec![Site {
        cluster: &cluster,
        engine: "criu",
    }];
    if have("dmtcp")? {
        sites.push(Site {
            cluster: &cluster,
            engine: "dmtcp",
        });
    }
    let mut jobs = Vec::new();
    for (site, step) in sites.into_iter().zip([false, true]) {
        let name = site.name("old");
        let job = site.lines(&name, step, "7", &[])?;
        jobs.push((site, name, job));
    }
    for (site, name, _) in &jobs {
        explained(&cluster, name, wait_progress(site.cluster, name, 20))?;
    }
    for (_, name, job) in &jobs {
        let node = node(&cluster, *job)?;
        ensure!(node == "n1", "{name} is on {node}");
    }
    let intruder = Intruder::on(&cluster, "n1")?;
    for (_, name, job) in &jobs {
        let node = explained(&cluster, name, wait_run(&cluster, *job, 1))?;
        ensure!(node == "n2", "{name} went on on {node}");
        open_gate(&cluster, name)?;
        let end = explained(&cluster, name, cluster.wait_end(*job, LIMIT))?;
        let result = (|| {
            ensure!(end["ExitCode"] == "7:0", "{end:?}");
            exact(&output(&cluster, name)?)
        })();
        explained(&cluster, name, result)?;
    }
    intruder.leave(&cluster)?;
    cluster.wait_nothing_left(LIMIT)
}
