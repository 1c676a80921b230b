//! A running cluster: starting it, acting in it, looking at it.
//!
//! Contract: [`Cluster::start`] returns once every node is idle. Errors end with the last lines of
//! Slurm's logs. Dropping a cluster ends every process in it, however it was started, and removes
//! its directory and control groups; the same happens when the process that holds it dies.
//!
//! How: `scripts/outer.sh` on the host starts `scripts/init.sh` as the first process of new
//! namespaces (the login host), which lives as long as a pipe from here. Each node is another set
//! of namespaces inside those (`scripts/node.sh`). Commands enter with nsenter.

mod command;
mod directory;
mod job;
mod look;
mod process;
mod script;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::cache::Entry;
use crate::conf::{self, Spec};
use crate::{dmtcp, image, root};
pub use command::Output;
use command::run_limited;
use directory::{lay_out, make_directory, remove_leftovers};
pub use job::Job;
use job::parse_job;
use look::tail;
pub use process::Process;
use script::{START_LIMIT, Starting, append_only_file, first_number, own_freezer};

/// How long a command in the cluster may take unless the caller says otherwise.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// Between two looks at something that cannot be waited for.
const POLL: Duration = Duration::from_millis(200);

const USERS: [(&str, u32); 3] = [("alice", 1001), ("bob", 1002), ("carol", 1003)];

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
            cluster.launch_node(&name)?;
        }
        for name in spec.node_names() {
            cluster.wait_idle(&name)?;
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
        self.launch_node(name)?;
        self.wait_idle(name)
    }

    /// Kills slurmctld, as a crash would.
    pub fn stop_controller(&self) -> Result<()> {
        let kill = "pid=$(cat /run/slurmctld.pid) && kill -9 $pid && \
                    while kill -0 $pid 2>/dev/null; do sleep 0.05; done";
        let killed = self.run("root", kill)?.ok();
        killed.map(drop).context("cannot stop slurmctld")
    }

    /// Starts slurmctld again, and waits until it answers.
    pub fn start_controller(&self) -> Result<()> {
        let start = "slurmctld && until scontrol ping | grep -q 'is UP'; do sleep 0.1; done";
        let started = self.run("root", start)?.ok();
        started.map(drop).context("cannot start slurmctld")
    }

    fn launch_node(&self, name: &str) -> Result<()> {
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
        Ok(())
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

fn uid(user: &str) -> Result<u32> {
    match USERS.iter().find(|(name, _)| *name == user) {
        Some((_, id)) => Ok(*id),
        None if user == "root" => Ok(0),
        None => bail!("the cluster has no user {user}"),
    }
}
