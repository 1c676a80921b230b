//! A running cluster: starting it, acting in it, looking at it.
//!
//! Contract: [`Cluster::start`] returns once every node is idle. Errors end with the last lines of
//! Slurm's logs. Dropping a cluster ends every process in it, however it was started, and removes
//! its directory and control groups; the same happens when the process that holds it dies.
//!
//! How: `scripts/outer.sh` on the host starts `scripts/init.sh` as the first process of new
//! namespaces (the login host), which lives as long as a pipe from here. Each node is another set
//! of namespaces inside those (`scripts/node.sh`). Commands enter with nsenter.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cache::{self, Entry};
use crate::conf::{self, Spec};
use crate::{dmtcp, image, root};

/// How long a command in the cluster may take unless the caller says otherwise.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// How long starting the cluster or a node may take: daemons and the file system, no downloads.
const START_LIMIT: Duration = Duration::from_secs(90);

/// Between two looks at something that cannot be waited for.
const POLL: Duration = Duration::from_millis(200);

const USERS: [(&str, u32); 3] = [("alice", 1001), ("bob", 1002), ("carol", 1003)];

/// Directories of the host's own file system below the cluster's directory.
const PLAIN: [&str; 4] = ["home", "tmp", "var/tmp", "nodes"];

/// What `scontrol show job -o` says of a job, by key.
pub type Job = BTreeMap<String, String>;

/// A Slurm cluster that runs while this value lives.
#[derive(Debug)]
pub struct Cluster {
    spec: Spec,
    directory: PathBuf,
    /// This process's own group in the freezer's hierarchy.
    freezer: String,
    /// The DMTCP that is installed in the cluster.
    dmtcp: Option<PathBuf>,
    /// Process id of the login host's first process, as this host knows it.
    login: i32,
    outer: Child,
    control: Option<ChildStdin>,
    /// What the cluster's own scripts say on standard error. In no directory: it has to be there
    /// when the cluster is gone.
    script_log: fs::File,
    nodes: Mutex<BTreeMap<String, Node>>,
    baseline: BTreeMap<String, Vec<String>>,
    _layers: Vec<Entry>,
}

#[derive(Debug)]
struct Node {
    /// `nsenter` on this host, which waits for the node.
    child: Child,
    /// The node ends with this pipe.
    _control: ChildStdin,
    /// Process ids of the node's first process, on the login host and on this host.
    on_login: i32,
    on_host: i32,
}

/// How a command ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The standard output, or an error with everything if the command did not exit with 0.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "{}\nstandard output:\n{}\nstandard error:\n{}",
            self.status,
            self.stdout,
            self.stderr
        )
    }
}

/// A process in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// As the login host counts.
    pub pid: i32,
    pub parent: i32,
    pub uid: u32,
    pub comm: String,
    /// The command line, joined with spaces; empty for a zombie.
    pub args: String,
}

impl Cluster {
    pub fn start(spec: &Spec) -> Result<Cluster> {
        if !(1..=9).contains(&spec.nodes) {
            bail!("a cluster has 1 to 9 nodes, not {}", spec.nodes);
        }
        let root = root::root(spec.release)?;
        let images = if spec.images {
            Some(image::images()?)
        } else {
            None
        };
        let dmtcp = if spec.dmtcp { dmtcp::dmtcp() } else { None };
        let dmtcp_layer = dmtcp.as_deref().map(dmtcp::layer).transpose()?;

        let freezer = own_freezer()?;
        let (directory, lock) = make_directory()?;
        let mut lower = OsString::new();
        for layer in dmtcp_layer.iter().chain([&root]) {
            if !lower.is_empty() {
                lower.push(":");
            }
            lower.push(&layer.path);
        }
        let script_log = append_only_file()?;
        if let Err(error) = lay_out(spec, &directory, &root.path) {
            remove_leftovers(&directory);
            return Err(error);
        }

        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "flock", "--close"])
            .arg(directory.with_extension("lock"))
            .args(["/bin/sh", "-c", include_str!("../scripts/outer.sh"), "lab"])
            .env("LAB_INIT", include_str!("../scripts/init.sh"))
            .env("LAB_DIR", &directory)
            .env("LAB_FREEZER", &freezer)
            .env("LAB_NODES", spec.node_names().join(" "))
            .env("LAB_LOWER", &lower)
            .env(
                "LAB_IMAGES",
                images
                    .as_ref()
                    .map_or(OsStr::new(""), |entry| entry.path.as_os_str()),
            )
            .env("LAB_LOGIN_ADDRESS", conf::login_address());
        let mut layers = vec![root];
        layers.extend(images);
        layers.extend(dmtcp_layer);
        // From here on the script cleans up, and dropping the cluster waits for that.
        let mut started = Starting::spawn(&mut command, &script_log)?;
        let login = started.line("pid", START_LIMIT);
        drop(lock);
        let mut cluster = Cluster {
            spec: spec.clone(),
            directory,
            freezer,
            dmtcp,
            login: 0,
            outer: started.child,
            control: started.stdin,
            script_log,
            nodes: Mutex::default(),
            baseline: BTreeMap::new(),
            _layers: layers,
        };
        cluster.login = login
            .and_then(|words| first_number(&words))
            .map_err(|error| cluster.explain(error))?;
        started
            .lines
            .line("ready", START_LIMIT)
            .map_err(|error| cluster.explain(error))?;
        for name in spec.node_names() {
            cluster.start_node(&name)?;
        }
        cluster.baseline = cluster.mounts();
        Ok(cluster)
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// This host's directory with everything of the cluster. Gone with it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The prefix of the DMTCP installed in this cluster.
    pub fn dmtcp(&self) -> Option<&Path> {
        self.dmtcp.as_deref()
    }

    /// This host's path of an absolute path on the login host. `/tmp` and `/var/tmp` of a node are
    /// `/nodes/NODE/tmp` and `/nodes/NODE/var-tmp`. Don't follow absolute symbolic links with it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        PathBuf::from(format!("/proc/{}/root", self.login))
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// Writes a file as `user`, with mode 0644 (0755 if it starts with `#!`).
    pub fn write(&self, user: &str, inside: impl AsRef<Path>, text: &str) -> Result<()> {
        let path = self.path(&inside);
        let mode = if text.starts_with("#!") { 0o755 } else { 0o644 };
        let id = uid(user)?;
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .and_then(|()| std::os::unix::fs::chown(&path, Some(id), Some(id)))
            .with_context(|| format!("cannot write {} in the cluster", inside.as_ref().display()))
    }

    /// Runs a line of shell on the login host as a user, in the home directory with a fresh
    /// environment and nothing on standard input. Fails if it could not be run, or not in time; a
    /// non-zero exit is no failure.
    pub fn run(&self, user: &str, script: &str) -> Result<Output> {
        self.run_for(user, script, RUN_LIMIT)
    }

    /// [`Cluster::run`] with another time limit.
    pub fn run_for(&self, user: &str, script: &str, limit: Duration) -> Result<Output> {
        self.exec(None, user, &["sh", "-c", script], "", limit)
    }

    /// [`Cluster::run`] on a node.
    pub fn run_on(&self, node: &str, user: &str, script: &str) -> Result<Output> {
        self.exec(Some(node), user, &["sh", "-c", script], "", RUN_LIMIT)
    }

    /// Runs a program with the given standard input.
    pub fn exec(
        &self,
        node: Option<&str>,
        user: &str,
        argv: &[&str],
        input: &str,
        limit: Duration,
    ) -> Result<Output> {
        let what = || format!("{} as {user}: {}", node.unwrap_or("login"), argv.join(" "));
        let mut command = self.command(node, user, argv)?;
        run_limited(&mut command, input, limit).map_err(|error| self.explain(error.context(what())))
    }

    /// The command that runs `argv` in the cluster, streams not set. On the login host unless a node
    /// is named.
    pub fn command(&self, node: Option<&str>, user: &str, argv: &[&str]) -> Result<Command> {
        uid(user)?;
        let home = if user == "root" {
            "/root".to_owned()
        } else {
            format!("/home/{user}")
        };
        let pid = match node {
            None => self.login,
            Some(name) => self
                .nodes()
                .get(name)
                .map(|node| node.on_host)
                .with_context(|| format!("node {name} is not running"))?,
        };
        let mut path =
            OsString::from("/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin");
        if let Some(prefix) = &self.dmtcp {
            path.push(":");
            path.push(prefix.join("bin"));
        }
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={pid}"))
            .args(["--mount", "--uts", "--ipc", "--net", "--pid", "--"])
            .args(["setpriv", "--reuid", user, "--regid", user, "--init-groups"])
            .args(["env", "-i"])
            .arg(format!("--chdir={home}"))
            .args([
                format!("HOME={home}"),
                format!("USER={user}"),
                format!("LOGNAME={user}"),
            ])
            .args(["SHELL=/bin/bash", "LANG=C.UTF-8"])
            .arg({
                let mut variable = OsString::from("PATH=");
                variable.push(path);
                variable
            })
            .args(
                std::env::var("TERM")
                    .ok()
                    .map(|term| format!("TERM={term}")),
            )
            .args(argv);
        Ok(command)
    }

    /// Submits a batch script and returns the job's id.
    pub fn sbatch(&self, user: &str, args: &[&str], script: &str) -> Result<u32> {
        let mut argv = vec!["sbatch", "--parsable"];
        argv.extend(args);
        let output = self.exec(None, user, &argv, script, RUN_LIMIT)?;
        let stdout = output
            .ok()
            .with_context(|| format!("sbatch {} failed", args.join(" ")))?;
        let id = stdout.trim().split(';').next().unwrap_or_default();
        id.parse()
            .with_context(|| format!("sbatch printed {stdout:?} instead of a job id"))
    }

    /// What Slurm knows of a job.
    pub fn job(&self, id: u32) -> Result<Job> {
        let id = id.to_string();
        let output = self.exec(
            None,
            "root",
            &["scontrol", "show", "job", "-o", &id],
            "",
            RUN_LIMIT,
        )?;
        Ok(parse_job(&output.ok().with_context(|| {
            format!("scontrol show job {id} failed")
        })?))
    }

    /// Waits until `done` holds of a job.
    pub fn wait_job(&self, id: u32, limit: Duration, done: impl Fn(&Job) -> bool) -> Result<Job> {
        let start = Instant::now();
        loop {
            let job = self.job(id)?;
            if done(&job) {
                return Ok(job);
            }
            if start.elapsed() >= limit {
                return Err(self.explain(anyhow!(
                    "job {id} did not come to the expected state in {limit:?}; last seen: {job:#?}"
                )));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until a job has ended for good and everything of it is cleaned up.
    pub fn wait_end(&self, id: u32, limit: Duration) -> Result<Job> {
        self.wait_job(id, limit, |job| {
            !matches!(
                job.get("JobState").map_or("", String::as_str),
                "PENDING"
                    | "RUNNING"
                    | "COMPLETING"
                    | "CONFIGURING"
                    | "REQUEUED"
                    | "SUSPENDED"
                    | "STOPPED"
                    | "SIGNALING"
                    | "STAGE_OUT"
                    | "REQUEUE_HOLD"
                    | "REQUEUE_FED"
                    | "SPECIAL_EXIT"
                    | "RESV_DEL_HOLD"
                    | "RESIZING"
            )
        })
    }

    /// Waits until `done` holds of a file's text; a file that is missing counts as empty.
    pub fn wait_file(
        &self,
        inside: impl AsRef<Path>,
        limit: Duration,
        done: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let path = self.path(&inside);
        let start = Instant::now();
        loop {
            let text =
                fs::read(&path).map_or(String::new(), |b| String::from_utf8_lossy(&b).into());
            if done(&text) {
                return Ok(text);
            }
            if start.elapsed() >= limit {
                return Err(self.explain(anyhow!(
                    "{} did not hold what was expected in {limit:?}; its last lines:\n{}",
                    inside.as_ref().display(),
                    tail(&text, 30)
                )));
            }
            std::thread::sleep(POLL / 4);
        }
    }

    /// All processes of the cluster, nodes included.
    pub fn processes(&self) -> Vec<Process> {
        let Ok(entries) = fs::read_dir(self.path("/proc")) else {
            return Vec::new();
        };
        let mut found: Vec<Process> = entries
            .flatten()
            // One that ended meanwhile is none.
            .filter_map(|entry| Process::read(&entry.path()))
            .collect();
        found.sort_by_key(|process| process.pid);
        found
    }

    /// Processes that jobs and commands have left: all but the cluster's own daemons.
    pub fn leftover_processes(&self) -> Vec<Process> {
        let mut all = self.processes();
        all.retain(|process| !process.is_daemon());
        all
    }

    /// Mounts beyond those of a cluster at rest, on the login host and on the nodes.
    pub fn leftover_mounts(&self) -> Vec<String> {
        let none = Vec::new();
        self.mounts()
            .into_iter()
            .flat_map(|(host, mounts)| {
                let before = self.baseline.get(&host).unwrap_or(&none);
                let new: Vec<String> = mounts
                    .into_iter()
                    .filter(|mount| !before.contains(mount))
                    .map(|mount| format!("{host}: {mount}"))
                    .collect();
                new
            })
            .collect()
    }

    /// Waits until no process and no mount is left of jobs and commands.
    pub fn wait_nothing_left(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let (processes, mounts) = (self.leftover_processes(), self.leftover_mounts());
            if processes.is_empty() && mounts.is_empty() {
                return Ok(());
            }
            if start.elapsed() >= limit {
                let left: Vec<String> = processes
                    .iter()
                    .map(Process::to_string)
                    .chain(mounts)
                    .collect();
                return Err(self.explain(anyhow!(
                    "after {limit:?} there is left:\n{}",
                    left.join("\n")
                )));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Mounts ("type source on point") of the login host and each running node.
    fn mounts(&self) -> BTreeMap<String, Vec<String>> {
        let mut pids = BTreeMap::from([("login".to_owned(), self.login)]);
        pids.extend(
            self.nodes()
                .iter()
                .map(|(name, node)| (name.clone(), node.on_host)),
        );
        pids.into_iter()
            .map(|(host, pid)| {
                let text = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap_or_default();
                let mounts = text.lines().filter_map(|line| {
                    let words: Vec<&str> = line.split(' ').collect();
                    Some(format!(
                        "{} {} on {}",
                        words.get(2)?,
                        words.first()?,
                        words.get(1)?
                    ))
                });
                (host, mounts.collect())
            })
            .collect()
    }

    /// The last lines of the logs of slurmctld, slurmd and of the cluster's own scripts.
    pub fn logs(&self) -> String {
        let slurm = self.directory.join("upper/var/log/slurm");
        let mut logs = vec![("the cluster's scripts".to_owned(), self.script_text())];
        let nodes = self
            .spec
            .node_names()
            .into_iter()
            .map(|name| format!("slurmd.{name}.log"));
        for name in std::iter::once("slurmctld.log".to_owned()).chain(nodes) {
            let log = fs::read(slurm.join(&name)).unwrap_or_default();
            logs.push((name, String::from_utf8_lossy(&log).into_owned()));
        }
        logs.retain(|(_, text)| !text.is_empty());
        logs.iter()
            .map(|(name, text)| format!("--- {name}\n{}\n", tail(text, 25)))
            .collect()
    }

    fn script_text(&self) -> String {
        let mut bytes = vec![0; 64 * 1024];
        let length = self.script_log.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}\n{}", self.logs())
    }

    /// Loses a node: everything on it ends at once, as if its power was cut. Slurm is not told.
    pub fn stop_node(&self, name: &str) -> Result<()> {
        let mut node = self
            .nodes()
            .remove(name)
            .with_context(|| format!("node {name} is not running"))?;
        // By the login host's number: on this host it could by now be another process's.
        let kill = format!("kill -9 {}", node.on_login);
        self.run("root", &kill)?
            .ok()
            .with_context(|| format!("cannot stop node {name}"))?;
        node.child
            .wait()
            .with_context(|| format!("cannot wait for the end of node {name}"))?;
        Ok(())
    }

    /// Starts a node that is not running, and waits until it can take jobs.
    pub fn start_node(&self, name: &str) -> Result<()> {
        let number = self.spec.node_names().iter().position(|n| n == name);
        let number = number.with_context(|| format!("the cluster has no node {name}"))?;
        if self.nodes().contains_key(name) {
            bail!("node {name} is running already");
        }
        // The hierarchy is mounted where only the cluster's outermost script sees it.
        let group = PathBuf::from(format!("/proc/{}/root", self.outer.id()))
            .join(self.directory.strip_prefix("/").unwrap_or(&self.directory))
            .join("freezer")
            .join(self.freezer.trim_start_matches('/'))
            .join(self.directory.file_name().unwrap_or_default())
            .join(name);
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                "echo $$ >\"$LAB_GROUP/cgroup.procs\" && exec \"$@\"",
                "lab",
                "nsenter",
            ])
            .arg(format!("--target={}", self.login))
            .args(["--mount", "--uts", "--ipc", "--net", "--pid", "--"])
            .args([
                "unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup",
            ])
            .args([
                "--fork",
                "--kill-child=KILL",
                "--propagation",
                "private",
                "--",
            ])
            .args([
                "/bin/sh",
                "-c",
                include_str!("../scripts/node.sh"),
                "lab-node",
            ])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LAB_GROUP", group)
            .env("LAB_NODE", name)
            .env("LAB_ADDRESS", conf::node_address(number as u32 + 1));
        let mut started = Starting::spawn(&mut command, &self.script_log)?;
        let node = started.node().map_err(|error| self.explain(error));
        let (on_login, on_host, mut control) = match node {
            Ok(node) => node,
            Err(error) => {
                started.end();
                return Err(error.context(format!("cannot start node {name}")));
            }
        };
        let cable = format!(
            "ip link del v{name} 2>/dev/null; \
             ip link add v{name} master bridge type veth peer name eth0 netns {on_login} && \
             ip link set v{name} up"
        );
        let ready = self
            .run("root", &cable)
            .and_then(Output::ok)
            .and_then(|_| control.write_all(b"go\n").context("the node has ended"))
            .and_then(|()| started.lines.line("ready", START_LIMIT))
            .map_err(|error| self.explain(error));
        if let Err(error) = ready {
            drop(control);
            started.end();
            return Err(error.context(format!("cannot start node {name}")));
        }
        self.nodes().insert(
            name.to_owned(),
            Node {
                child: started.child,
                _control: control,
                on_login,
                on_host,
            },
        );
        self.wait_idle(name)
    }

    fn wait_idle(&self, name: &str) -> Result<()> {
        let start = Instant::now();
        let argv = [
            "sinfo",
            "--noheader",
            "-p",
            "normal",
            "-n",
            name,
            "-o",
            "%T",
        ];
        loop {
            let output = self.exec(None, "root", &argv, "", RUN_LIMIT)?;
            let state = output.stdout.trim();
            if ["idle", "mixed", "allocated"].contains(&state) {
                return Ok(());
            }
            if !self.has_slurmd(name) {
                return Err(self.explain(anyhow!("slurmd of node {name} has ended")));
            }
            if start.elapsed() >= START_LIMIT {
                return Err(self.explain(anyhow!(
                    "node {name} did not become usable in {START_LIMIT:?}; sinfo says {output:?}"
                )));
            }
            std::thread::sleep(POLL / 2);
        }
    }

    /// Whether slurmd runs on a node. It leaves the script that started it before it is sure that
    /// it can run.
    fn has_slurmd(&self, node: &str) -> bool {
        let Some(first) = self.nodes().get(node).map(|node| node.on_login) else {
            return false;
        };
        self.processes()
            .iter()
            .any(|process| process.parent == first && process.comm == "slurmd")
    }

    fn nodes(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Node>> {
        self.nodes
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.control.take());
        if let Err(error) = self.outer.wait() {
            eprintln!("lab: cannot wait for the end of a cluster: {error}");
        }
        for node in self.nodes().values_mut() {
            if let Err(error) = node.child.wait() {
                eprintln!("lab: cannot wait for the end of a node: {error}");
            }
        }
        if self.directory.exists() {
            eprintln!("lab: {} is left over", self.directory.display());
        }
    }
}

/// A script that reports its progress on standard output.
struct Starting {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines,
}

struct Lines(mpsc::Receiver<String>);

impl Lines {
    /// The words after `keyword` of the next line, which has to start with it.
    fn line(&mut self, keyword: &str, limit: Duration) -> Result<String> {
        let line = self.0.recv_timeout(limit).map_err(|_| {
            anyhow!(
                "a script of the cluster ended, or did nothing for {limit:?}, before {keyword:?}"
            )
        })?;
        line.strip_prefix(keyword)
            .map(|rest| rest.trim().to_owned())
            .with_context(|| {
                format!("a script of the cluster said {line:?} instead of {keyword:?}")
            })
    }
}

impl Starting {
    fn spawn(command: &mut Command, log: &fs::File) -> Result<Starting> {
        let log = log.try_clone().context("cannot duplicate a descriptor")?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // A group of its own: Ctrl-C is for the command that runs in the cluster.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let stdin = child.stdin.take();
        let (sender, receiver) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Starting {
            child,
            stdin,
            lines: Lines(receiver),
        })
    }

    fn line(&mut self, keyword: &str, limit: Duration) -> Result<String> {
        self.lines.line(keyword, limit)
    }

    /// A node's first process, on the login host and on this host, and the pipe it lives by.
    fn node(&mut self) -> Result<(i32, i32, ChildStdin)> {
        let words = self.lines.line("pid", START_LIMIT)?;
        let on_login = first_number(&words)?;
        let namespace = words
            .split(' ')
            .nth(1)
            .context("a node did not tell its namespace")?;
        let on_host = first_process_of(namespace)
            .with_context(|| format!("no process is the first of {namespace}"))?;
        Ok((
            on_login,
            on_host,
            self.stdin.take().context("a node has no standard input")?,
        ))
    }

    /// Ends a node that did not come up.
    fn end(&mut self) {
        drop(self.stdin.take());
        // nsenter, unshare and the node's shell are one group.
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Err(error) = killpg(Pid::from_raw(pid), Signal::SIGKILL)
        {
            eprintln!("lab: cannot end a node that did not start: {error}");
        }
        if let Err(error) = self.child.wait() {
            eprintln!("lab: cannot wait for the end of a node: {error}");
        }
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let args: String = self.args.chars().take(160).collect();
        write!(
            out,
            "{} (child of {}, uid {}) {}: {args}",
            self.pid, self.parent, self.uid, self.comm
        )
    }
}

impl Process {
    /// Whether this belongs to a cluster at rest.
    fn is_daemon(&self) -> bool {
        const DAEMONS: [&str; 7] = [
            "unshare",
            "slurmctld",
            "slurmscriptd",
            "slurmd",
            "cat",
            "sh",
            "nsenter",
        ];
        // From 23.11 on slurmd may keep a slurmstepd of its own, which is no step's.
        let own = DAEMONS.contains(&self.comm.as_str()) || self.args.ends_with("stepd infinity");
        self.comm == "munged" || self.uid == 0 && own
    }

    fn read(directory: &Path) -> Option<Process> {
        let pid = directory.file_name()?.to_str()?.parse().ok()?;
        let status = fs::read_to_string(directory.join("status")).ok()?;
        let field = |key: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            line.split_whitespace().next()
        };
        let args = fs::read(directory.join("cmdline")).ok()?;
        let args = String::from_utf8_lossy(&args).replace('\0', " ");
        Some(Process {
            pid,
            parent: field("PPid")?.parse().ok()?,
            uid: field("Uid")?.parse().ok()?,
            comm: field("Name").unwrap_or_default().to_owned(),
            args: args.trim_end().to_owned(),
        })
    }
}

/// Runs a command to its end with the given input.
fn run_limited(command: &mut Command, input: &str, limit: Duration) -> Result<Output> {
    // Files, not pipes: a daemon that the command leaves behind may keep them open.
    let file = || tempfile::tempfile().context("cannot create a temporary file");
    let (mut stdin, stdout, stderr) = (file()?, file()?, file()?);
    stdin
        .write_all(input.as_bytes())
        .and_then(|()| stdin.rewind())
        .context("cannot write a temporary file")?;
    let clone = |file: &fs::File| file.try_clone().context("cannot duplicate a descriptor");
    let mut child = command
        .stdin(stdin)
        .stdout(clone(&stdout)?)
        .stderr(clone(&stderr)?)
        .process_group(0)
        .spawn()
        .context("cannot run nsenter")?;
    let group = Pid::from_raw(i32::try_from(child.id()).context("a process id is too large")?);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait()));
    let waited = receiver.recv_timeout(limit);
    if waited.is_err() {
        // Not reaped yet, so the group is still this command's. What left the group ends with the
        // cluster.
        killpg(group, Signal::SIGKILL).context("cannot end a command that took too long")?;
    }
    let read = |mut file: fs::File| -> Result<String> {
        let mut bytes = Vec::new();
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .context("cannot read a temporary file")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (stdout, stderr) = (read(stdout)?, read(stderr)?);
    match waited {
        Ok(status) => Ok(Output {
            status: status.context("cannot wait")?,
            stdout,
            stderr,
        }),
        Err(_) => bail!("did not end in {limit:?}; standard output:\n{stdout}\nerror:\n{stderr}"),
    }
}

/// A file without a name whose writers don't overwrite each other.
fn append_only_file() -> Result<fs::File> {
    let file = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
    fs::File::options()
        .read(true)
        .append(true)
        .open(file.path())
        .with_context(|| format!("cannot open {}", file.path().display()))
}

fn uid(user: &str) -> Result<u32> {
    match USERS.iter().find(|(name, _)| *name == user) {
        Some((_, id)) => Ok(*id),
        None if user == "root" => Ok(0),
        None => bail!("the cluster has no user {user}"),
    }
}

/// `scontrol show job -o`: words "key=value"; a value may hold blanks.
fn parse_job(line: &str) -> Job {
    let mut job = Job::new();
    let mut last = String::new();
    for word in line.lines().next().unwrap_or_default().split(' ') {
        let key = word.split_once('=').filter(|(key, _)| {
            key.starts_with(|first: char| first.is_ascii_uppercase())
                && key
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "/:_".contains(c))
        });
        match key {
            Some((key, value)) => {
                last = key.to_owned();
                job.insert(last.clone(), value.to_owned());
            }
            None => {
                if let Some(value) = job.get_mut(&last) {
                    *value += " ";
                    *value += word;
                }
            }
        }
    }
    for value in job.values_mut() {
        value.truncate(value.trim_end().len());
    }
    job
}

fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn first_number(words: &str) -> Result<i32> {
    let word = words.split(' ').next().unwrap_or_default();
    word.parse()
        .with_context(|| format!("{word:?} is no process id"))
}

/// This host's number of the process that is number 1 in a PID namespace (`pid:[4026532…]`).
fn first_process_of(namespace: &str) -> Option<i32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let link = fs::read_link(entry.path().join("ns/pid")).ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let chain = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        (link.as_os_str() == namespace && chain.split_whitespace().next_back() == Some("1"))
            .then_some(pid)
    })
}

/// This process's group in the v1 freezer's hierarchy, without a slash at the end; the root where
/// the host does not use that hierarchy.
fn own_freezer() -> Result<String> {
    let own = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let group = own.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        (controllers == "freezer").then_some(path)
    });
    Ok(group.unwrap_or("/").trim_end_matches('/').to_owned())
}

/// A new directory for a cluster, and a lock that keeps others from taking it for a leftover until
/// its own script holds the lock file. Sweeps what clusters have left whose scripts were killed.
fn make_directory() -> Result<(PathBuf, fs::File)> {
    let parent = cache::directory().join("clusters");
    fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let lock = fs::File::create(parent.join("lock"))
        .with_context(|| format!("cannot create a lock in {}", parent.display()))?;
    lock.lock()
        .with_context(|| format!("cannot lock {}", parent.display()))?;

    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let unused = fs::File::open(path.with_extension("lock"))
            .map_or(true, |lock| lock.try_lock().is_ok());
        if unused {
            remove_leftovers(&path);
        }
    }
    let directory = tempfile::Builder::new()
        .prefix("lab-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot create a directory in {}", parent.display()))?
        .keep();
    Ok((directory, lock))
}

/// Removes the directory of a cluster that nobody runs. Failures are only told: it is found again at
/// the next start. Control groups are swept by the outermost script.
fn remove_leftovers(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("lab: cannot remove {}: {error}", directory.display());
    }
    if let Err(error) = fs::remove_file(directory.with_extension("lock"))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!(
            "lab: cannot remove a lock of {}: {error}",
            directory.display()
        );
    }
}

/// Fills a cluster's directory: the overlay's upper layer with all files of ours, and the plain
/// directories.
fn lay_out(spec: &Spec, directory: &Path, root: &Path) -> Result<()> {
    let make = |path: &Path, mode: u32, owner: u32| {
        fs::create_dir_all(path)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
            .and_then(|()| std::os::unix::fs::chown(path, Some(owner), Some(owner)))
            .with_context(|| format!("cannot create {}", path.display()))
    };
    make(directory, 0o755, 0)?;
    for name in ["upper", "work", "root"] {
        make(&directory.join(name), 0o755, 0)?;
    }
    for name in PLAIN {
        make(&directory.join("plain").join(name), 0o755, 0)?;
    }
    for name in ["tmp", "var/tmp"] {
        make(&directory.join("plain").join(name), 0o1777, 0)?;
    }
    for (user, id) in USERS {
        make(&directory.join("plain/home").join(user), 0o700, id)?;
    }
    for name in spec.node_names() {
        for temporary in ["tmp", "var-tmp"] {
            make(
                &directory.join("plain/nodes").join(&name).join(temporary),
                0o1777,
                0,
            )?;
        }
    }

    let upper = directory.join("upper");
    let write = |path: &str, mode: u32, contents: &[u8]| -> Result<()> {
        let inside = Path::new(path);
        make_like(root, &upper, inside.parent().unwrap_or(inside))?;
        let path = upper.join(inside.strip_prefix("/").unwrap_or(inside));
        fs::write(&path, contents)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("cannot write {}", path.display()))
    };
    for path in ["/var/log/slurm", "/var/spool/slurmctld"] {
        make_like(root, &upper, Path::new(path))?;
    }
    write("/etc/hosts", 0o644, spec.hosts().as_bytes())?;
    write("/etc/hostname", 0o644, b"login\n")?;
    write("/etc/slurm/slurm.conf", 0o644, spec.slurm_conf().as_bytes())?;
    write(
        "/etc/slurm/cgroup.conf",
        0o644,
        conf::CGROUP_CONF.as_bytes(),
    )?;
    write(
        "/etc/slurm/plugstack.conf",
        0o644,
        b"include /etc/slurm/plugstack.conf.d/*.conf\n",
    )?;
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    if let Some(plugin) = &spec.plugin {
        let target = format!("{PLUGINS}/container_checkpoint.so");
        write(&target, 0o644, &read(plugin)?)?;
        let file = "/etc/slurm/plugstack.conf.d/container-checkpoint.conf";
        write(file, 0o644, spec.plugstack_conf().as_bytes())?;
    }
    if let Some(helper) = &spec.helper {
        write("/usr/bin/container-checkpoint", 0o755, &read(helper)?)?;
    }
    if let Some(config) = &spec.config {
        write(
            "/etc/slurm/container-checkpoint.yaml",
            0o644,
            config.as_bytes(),
        )?;
    }
    for file in &spec.files {
        let path = file.path.to_str().context("a file's path is not UTF-8")?;
        write(path, file.mode, &file.contents)?;
    }
    Ok(())
}

/// Where Debian's Slurm looks for plugins.
const PLUGINS: &str = "/usr/lib/x86_64-linux-gnu/slurm-wlm";

/// Creates a directory in the upper layer with the modes it and its parents have below, so that
/// the layer does not change what it covers. Directories of ours are 0755 and root's.
fn make_like(root: &Path, upper: &Path, inside: &Path) -> Result<()> {
    let relative = inside.strip_prefix("/").unwrap_or(inside);
    let mut path = PathBuf::new();
    for part in relative.components() {
        path.push(part);
        let target = upper.join(&path);
        if target.exists() {
            continue;
        }
        let mode = match fs::symlink_metadata(root.join(&path)) {
            Ok(data) if data.is_dir() => data.permissions(),
            Ok(_) => bail!(
                "/{} is no directory in the root file system",
                path.display()
            ),
            Err(_) => fs::Permissions::from_mode(0o755),
        };
        fs::create_dir(&target)
            .and_then(|()| fs::set_permissions(&target, mode))
            .with_context(|| format!("cannot create {}", target.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_line_is_split_at_its_keys() {
        let line = "JobId=3 JobName=a b c UserId=alice(1001) ReqNodeList=(null) Command=/x y=1 \
                    NumNodes=1 OverSubscribe=OK\n";
        let job = parse_job(line);
        assert_eq!(job["JobName"], "a b c");
        assert_eq!(job["Command"], "/x y=1");
        assert_eq!(job["OverSubscribe"], "OK");
        assert_eq!(parse_job(""), Job::new());
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended_with_what_it_wrote() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 1000"]);
        let error = run_limited(&mut command, "", Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("begun"), "{error:#}");
    }

    #[test]
    fn a_background_process_does_not_hold_up_a_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; sleep 20 & exit 3"]);
        let start = Instant::now();
        let output = run_limited(&mut command, "input", Duration::from_secs(15)).unwrap();
        assert_eq!(
            (output.stdout.as_str(), output.status.code()),
            ("input", Some(3))
        );
        assert!(start.elapsed() < Duration::from_secs(15));
    }
}
