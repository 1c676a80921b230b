//! Stands between the application's processes and DMTCP's coordinator.
//!
//! ```text
//! processes of the application ── TCP, 127.0.0.1 ── relay ── Unix socket ── dmtcp_coordinator
//! ```
//!
//! Five things that DMTCP alone does not give:
//!
//! - **Nobody else.** The coordinator takes any command from anybody who can connect. Here it listens
//!   on a socket in a directory of the user's, and the relay lets in only processes of the same user,
//!   and none of them with commands: those are the helper's.
//! - **An exact stop.** DMTCP's own "checkpoint, then kill" forgets processes that fork while it
//!   starts; they run on. The relay can hold back the release of the barrier at which all processes
//!   are stopped and written ([`protocol::WRITTEN`]). Whoever asked for the checkpoint then looks at
//!   the process images and either ends the application right there or lets it go on.
//! - **No race after a checkpoint or restart.** While some processes are still on their way back to
//!   running, the coordinator answers a process that another one starts with a refusal or a second
//!   checkpoint request; the application dies or freezes. The relay lets new processes wait until
//!   all run.
//! - **No order too many.** The coordinator repeats its order to checkpoint to a process that has
//!   just become another program (exec), for it may have been read by the program before. Where it
//!   has not been, the new program finds both; where that happens twice, three, and ends itself
//!   (`waitForBarrier` in coordinatorapi.cpp). The relay drops an order while one is unread.
//! - **Events.** What passes tells when a restart or a checkpoint is through; nobody has to poll.
//!
//! A step of several ranks has one coordinator, that of rank 0. The relays of the other ranks lead
//! to the relay of rank 0, which knows them by a secret ([`Meeting`]); processes themselves only ever
//! connect to the relay on their own node.
//!
//! The coordinator runs outside of the application's container, as a child of the relay's thread: the
//! kernel ends it when that thread ends, and so also when the helper is killed. Signals that Slurm
//! sends to every process of a job are blocked in it.

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::TcpStreamExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use serde::{Deserialize, Serialize};

use super::protocol::{self, Answer, Cutter, Foreign, Message, Passage, kind};
use crate::sys;

/// The descriptor on which the coordinator takes a socket that listens already
/// (`PROTECTED_COORD_FD` of DMTCP 3.1 to 4.2).
const COORDINATOR_FD: i32 = 821;

/// DMTCP keeps descriptors below this number for itself (`PROTECTED_FD_END` of `protectedfds.h`).
pub const FILES_NEEDED: u64 = 842;

/// Reading stops for a while when this much waits for the other side, in bytes.
const WAITING_MAX: usize = 4 << 20;

/// How long new processes wait for those that are on their way back from a checkpoint or a restart.
/// That takes milliseconds; the limit is for a process that never comes.
const RETURNING: Duration = Duration::from_secs(10);

/// How soon the coordinator is asked again whether all processes run.
const ASK_AGAIN: Duration = Duration::from_millis(5);

/// How long a coordinator in a container may take to end, before it is killed.
const ENDING: Duration = Duration::from_secs(5);

/// Name of the coordinator's socket in its directory.
const SOCKET: &str = "coordinator.sock";

/// How long a command to the coordinator may take. It answers at once unless it hangs.
const ANSWER: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("cannot {what} for DMTCP's coordinator in {dir}: {source}")]
    Io {
        what: &'static str,
        dir: PathBuf,
        source: io::Error,
    },
    #[error(
        "DMTCP needs {FILES_NEEDED} open files and this job may open {0}; raise the limit \
         (`ulimit -Hn`, or LimitNOFILE= of slurmd)"
    )]
    Files(u64),
    #[error("DMTCP's coordinator does not answer: {0}")]
    Silent(io::Error),
    #[error("DMTCP's coordinator ended; its log is {0}")]
    Ended(PathBuf),
    #[error("rank 0 was not found within {limit:?}: {file}: {why}")]
    Alone {
        limit: Duration,
        file: PathBuf,
        why: String,
    },
}

/// What the relay does with the release of the [`protocol::WRITTEN`] barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    Pass,
    /// The processes stay stopped.
    Hold,
    /// Forgotten: the processes wait for the word that ends them.
    Drop,
}

/// What is known of the application; every change of it is announced.
#[derive(Debug, Clone)]
pub struct State {
    pub release: Release,
    /// How often a process was released from the [`protocol::WRITTEN`] barrier, or would have been.
    pub written: u64,
    /// Counts what may have changed the application's state.
    pub events: u64,
    /// Connections of processes of the application.
    pub links: usize,
    pub coordinator_gone: bool,
    /// Set by [`Relay::watch`]'s caller's child.
    pub child_gone: bool,
    /// How many processes have said that they go on, after a checkpoint or a restart.
    pub resumed: u32,
    /// Somebody spoke another protocol: [`Release::Hold`] cannot be relied on.
    pub foreign: bool,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panicking thread leaves plain numbers behind, nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, what: impl FnOnce(&mut State)) {
        what(&mut self.state());
        self.changed.notify_all();
    }
}

/// A running relay with its coordinator.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    wake: UnixStream,
    port: u16,
    upstream: Upstream,
    log: PathBuf,
    thread: Option<JoinHandle<()>>,
}

/// Where the relay of rank 0 is found by those of other ranks, and the secret that lets them in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meeting {
    host: String,
    port: u16,
    secret: String,
}

/// Length of the secret in bytes.
const SECRET: usize = 64;

/// What is behind a relay.
#[derive(Debug)]
enum Upstream {
    /// The coordinator's directory; held open so that its socket has a short path.
    Coordinator(OwnedFd),
    Rank0 {
        address: SocketAddr,
        secret: String,
    },
}

impl Upstream {
    fn connect(&self) -> io::Result<OwnedFd> {
        match self {
            Upstream::Coordinator(dir) => {
                let stream = UnixStream::connect(short(dir))?;
                stream.set_read_timeout(Some(ANSWER))?;
                stream.set_write_timeout(Some(ANSWER))?;
                Ok(stream.into())
            }
            Upstream::Rank0 { address, secret } => {
                let mut stream = TcpStream::connect_timeout(address, ANSWER)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(ANSWER))?;
                stream.set_write_timeout(Some(ANSWER))?;
                stream.write_all(secret.as_bytes())?;
                Ok(stream.into())
            }
        }
    }

    fn ask(&self, command: protocol::Command) -> io::Result<Answer> {
        let socket = self.connect()?;
        match self {
            Upstream::Coordinator(_) => protocol::ask(&mut UnixStream::from(socket), command),
            Upstream::Rank0 { .. } => protocol::ask(&mut TcpStream::from(socket), command),
        }
    }

    fn try_clone(&self) -> io::Result<Upstream> {
        Ok(match self {
            Upstream::Coordinator(dir) => Upstream::Coordinator(dir.try_clone()?),
            Upstream::Rank0 { address, secret } => Upstream::Rank0 {
                address: *address,
                secret: secret.clone(),
            },
        })
    }
}

/// A coordinator that is to be started.
#[derive(Debug)]
pub struct Coordinator {
    pub command: Command,
    /// Whether it is told to end, and not killed: whoever started the container has to clean up.
    pub in_container: bool,
}

/// How other ranks are let in.
#[derive(Debug)]
struct Door {
    listener: TcpListener,
    secret: String,
}

impl Relay {
    /// Leads to the relay of rank 0, which leaves word of itself in `file` (see
    /// [`Relay::start`]) on a file system that all ranks see. Waits for it up to `limit`.
    pub fn join(file: &Path, log: &Path, limit: Duration) -> Result<Relay, RelayError> {
        let end = Instant::now() + limit;
        loop {
            // What is found may be of an earlier run: then nobody answers.
            let why = match Relay::upstream(file) {
                Ok(upstream) => return Relay::serve(upstream, None, None, log, None),
                Err(why) => why,
            };
            if Instant::now() >= end {
                return Err(RelayError::Alone {
                    limit,
                    file: file.into(),
                    why: why.to_string(),
                });
            }
            // Network file systems tell nobody of files that other nodes write.
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn upstream(file: &Path) -> io::Result<Upstream> {
        let meeting: Meeting = serde_json::from_slice(&std::fs::read(file)?)?;
        let addresses = (meeting.host.as_str(), meeting.port).to_socket_addrs()?;
        let mut last = io::Error::other("its host has no IPv4 address");
        for address in addresses.filter(SocketAddr::is_ipv4) {
            let upstream = Upstream::Rank0 {
                address,
                secret: meeting.secret.clone(),
            };
            match upstream.ask(protocol::Command::Status) {
                Ok(_) => return Ok(upstream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Starts `coordinator` (see [`on_host`]) with its files in `dir`, an existing directory that only
    /// the user can enter, and the relay before it. With other ranks, word for them is left in the
    /// file `meeting`; `one_node` says that all are on this node.
    pub fn start(
        coordinator: Coordinator,
        dir: &Path,
        meeting: Option<&Path>,
        one_node: bool,
    ) -> Result<Relay, RelayError> {
        let failed = |what| {
            let dir = dir.to_path_buf();
            move |source: io::Error| RelayError::Io { what, dir, source }
        };
        let opened: OwnedFd = std::fs::File::open(dir)
            .map_err(failed("open the directory"))?
            .into();
        let socket = short(&opened);
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove an old socket")(error));
            }
            _ => {}
        }
        let inner = UnixListener::bind(&socket).map_err(failed("make a socket"))?;
        let log = dir.join("coordinator.log");
        let coordinator = Coordinator {
            command: prepared(coordinator.command, &log, inner).map_err(failed("write the log"))?,
            ..coordinator
        };
        let limit = getrlimit(Resource::RLIMIT_NOFILE)
            .map_err(|errno| failed("read the limit of open files")(errno.into()))?;
        if limit.1 < FILES_NEEDED {
            return Err(RelayError::Files(limit.1));
        }
        let host = match (meeting, one_node) {
            (Some(_), false) => nix::unistd::gethostname()
                .map_err(|errno| failed("find this host's name")(errno.into()))?
                .to_string_lossy()
                .into_owned(),
            _ => Ipv4Addr::LOCALHOST.to_string(),
        };
        let door = match meeting {
            None => None,
            Some(_) => Some(Door::open(one_node).map_err(failed("listen for other ranks"))?),
        };
        let word = door.as_ref().map(|door| {
            Ok(Meeting {
                host: host.clone(),
                port: door.listener.local_addr()?.port(),
                secret: door.secret.clone(),
            })
        });
        let word = word
            .transpose()
            .map_err(failed("find the port for other ranks"))?;
        let addresses = (host.as_str(), 0)
            .to_socket_addrs()
            .map_err(failed("find this host's address"))?
            .filter_map(|address| match address.ip() {
                IpAddr::V4(ip) => Some(ip),
                IpAddr::V6(_) => None,
            });
        // Debian lets a host's own name stand for 127.0.1.1 as well.
        let address = addresses.min_by_key(Ipv4Addr::is_loopback);
        let upstream = Upstream::Coordinator(opened);
        let relay = Relay::serve(upstream, Some(coordinator), door, &log, address)?;
        if let (Some(file), Some(word)) = (meeting, word) {
            leave_word(file, &word).map_err(failed("leave word for other ranks"))?;
        }
        Ok(relay)
    }

    /// Starts the thread.
    fn serve(
        upstream: Upstream,
        coordinator: Option<Coordinator>,
        door: Option<Door>,
        log: &Path,
        address: Option<Ipv4Addr>,
    ) -> Result<Relay, RelayError> {
        let failed = |what| {
            let dir = log.parent().unwrap_or(log).to_path_buf();
            move |source: io::Error| RelayError::Io { what, dir, source }
        };
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed("listen on a port"))?;
        let port = listener
            .local_addr()
            .map_err(failed("find the port"))?
            .port();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                release: Release::Pass,
                written: 0,
                events: 0,
                links: 0,
                coordinator_gone: false,
                child_gone: false,
                resumed: 0,
                foreign: false,
                stop: false,
            }),
            changed: Condvar::new(),
        });
        let (wake, woken) = UnixStream::pair().map_err(failed("make a pair of sockets"))?;
        let mut carrier = Carrier {
            shared: Arc::clone(&shared),
            listener,
            door,
            woken,
            upstream: upstream.try_clone().map_err(failed("open the directory"))?,
            address,
            links: Vec::new(),
            gate: Gate::default(),
            own: nix::unistd::getuid().as_raw(),
        };
        let (started, start) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("dmtcp-relay".into())
            .spawn(move || {
                // The coordinator is this thread's child, so that it ends with it. Once started, its
                // listening socket is its alone.
                let in_container = coordinator.as_ref().is_some_and(|one| one.in_container);
                let coordinator = coordinator.map(|mut coordinator| {
                    let child = coordinator.command.spawn()?;
                    let end = sys::pidfd(nix::unistd::Pid::from_raw(child.id().cast_signed()))?;
                    Ok((child, end))
                });
                // The other side waits for exactly this.
                match coordinator.transpose() {
                    Ok(coordinator) => {
                        let _ = started.send(Ok(()));
                        let (child, end) = coordinator.unzip();
                        carrier.carry(end.as_ref());
                        if in_container && let Some(end) = &end {
                            carrier.quit(end);
                        }
                        carrier.finish(child);
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })
            .map_err(failed("start a thread"))?;
        let relay = Relay {
            shared,
            wake,
            port,
            upstream,
            log: log.into(),
            thread: Some(thread),
        };
        start
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
            .map_err(failed("start the program"))?;
        relay.ask(protocol::Command::Status)?;
        Ok(relay)
    }

    /// The port on 127.0.0.1 on which processes of the application find their coordinator.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Asks the coordinator.
    pub fn ask(&self, command: protocol::Command) -> Result<Answer, RelayError> {
        let answer = self.upstream.ask(command);
        match answer {
            Err(_) if self.shared.state().coordinator_gone => {
                Err(RelayError::Ended(self.log.clone()))
            }
            other => other.map_err(RelayError::Silent),
        }
    }

    /// Says what is to become of the next release.
    pub fn release(&self, release: Release) {
        self.shared.change(|state| state.release = release);
        self.wake();
    }

    pub fn state(&self) -> State {
        self.shared.state().clone()
    }

    /// Waits until `ready` finds what it looks for (and gives it back) or `end` has come. `ready` is
    /// asked at once and after every change.
    pub fn wait<T>(&self, end: Instant, mut ready: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let mut state = self.shared.state();
        loop {
            if let Some(found) = ready(&state) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A function that announces the end of the application's first process.
    pub fn on_child_end(&self) -> impl FnOnce() + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || {
            shared.change(|state| {
                state.child_gone = true;
                state.events += 1;
            });
        }
    }

    fn wake(&self) {
        // A full buffer means that the relay is about to wake up anyway.
        let _ = send(
            self.wake.as_raw_fd(),
            &[1],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        );
    }

    /// Ends the coordinator and every connection. Processes that are left lose their coordinator
    /// and end themselves with code 99.
    pub fn stop(&mut self) {
        self.shared.change(|state| state.stop = true);
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::warn!("the thread that served DMTCP's coordinator panicked");
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Door {
    fn open(one_node: bool) -> io::Result<Door> {
        use std::io::Read;
        let interface = match one_node {
            true => Ipv4Addr::LOCALHOST,
            false => Ipv4Addr::UNSPECIFIED,
        };
        let listener = TcpListener::bind((interface, 0))?;
        let mut random = [0; SECRET / 2];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let secret = random.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Door { listener, secret })
    }
}

/// Writes `word` into `file`, whole or not at all, for the user alone.
fn leave_word(file: &Path, word: &Meeting) -> io::Result<()> {
    let mut written = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(file))?;
    serde_json::to_writer(&mut written, word)?;
    written.flush()?;
    written.persist(file)?;
    Ok(())
}

/// The path of the socket in `dir` that fits into a socket's address whatever the directory's is.
fn short(dir: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// A coordinator's options: it writes into `dir` as it sees it.
pub fn coordinator_options(dir: &Path) -> [OsString; 5] {
    let dir = dir.as_os_str().to_owned();
    let words = ["--quiet", "--stale-timeout", "-1", "--ckptdir"].map(OsString::from);
    let [quiet, stale, never, ckptdir] = words;
    [quiet, stale, never, ckptdir, dir]
}

/// The command of the coordinator `program` on this host, with a minimal environment.
pub fn on_host(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(coordinator_options(dir))
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("DMTCP_TMPDIR", dir)
        .current_dir(dir);
    // Where a site's module system leads the loader to DMTCP's libraries.
    if let Some(path) = std::env::var_os("LD_LIBRARY_PATH") {
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}

/// A coordinator's command with all that is the same for each: own session, nothing on its streams,
/// the socket that it listens on.
fn prepared(mut command: Command, log: &Path, socket: UnixListener) -> io::Result<Command> {
    use std::os::unix::fs::OpenOptionsExt;
    let log = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    // Slurm's proctrack/linuxproc sends a job's signals to every process below it; the coordinator's
    // end would be the application's. A vanished peer must not end it either.
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
        Signal::SIGPIPE,
    ] {
        blocked.add(signal);
    }
    sys::before_exec(&mut command, move || {
        sys::die_with_parent(libc::SIGKILL)?;
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
        nix::unistd::setsid()?;
        raise_open_files()?;
        sys::close_from(3)?;
        sys::inherit_as(&socket, COORDINATOR_FD)
    });
    Ok(command)
}

/// Raises this process's own limit of open files to what DMTCP needs. Async-signal-safe.
pub fn raise_open_files() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < FILES_NEEDED && hard >= FILES_NEEDED {
        setrlimit(
            Resource::RLIMIT_NOFILE,
            hard.min(FILES_NEEDED.max(4096)),
            hard,
        )?;
    }
    Ok(())
}

/// How many descriptors are waited for besides those of links.
const FIXED: usize = 5;

/// The relay's thread.
struct Carrier {
    shared: Arc<Shared>,
    listener: TcpListener,
    door: Option<Door>,
    woken: UnixStream,
    upstream: Upstream,
    /// This node's address for processes of the application on other nodes. Not known, and left to
    /// rank 0, in the relays of other ranks.
    address: Option<Ipv4Addr>,
    links: Vec<Link>,
    gate: Gate,
    own: u32,
}

/// Keeps new processes back while others are on their way back to running.
///
/// That all have said they run is not enough: the coordinator reads its connections in an order of
/// its own. So it is asked, and opens the gate by its answer.
#[derive(Default)]
struct Gate {
    closed: bool,
    /// The question that is on its way to the coordinator.
    question: Option<(OwnedFd, Cutter)>,
    /// When to ask again after a no.
    again: Option<Instant>,
    /// Since when a process has been waiting.
    waiting: Option<Instant>,
}

impl Gate {
    /// When something is to be done though nothing is heard.
    fn until(&self) -> Option<Instant> {
        let asks = self
            .again
            .filter(|_| self.closed && self.question.is_none());
        let opens = self.waiting.map(|since| since + RETURNING);
        asks.into_iter().chain(opens).min()
    }

    /// Asks whether all run.
    fn ask(&mut self, upstream: &Upstream) -> io::Result<()> {
        let socket = upstream.connect()?;
        let mut question = protocol::question(protocol::Command::Status);
        flush(socket.as_raw_fd(), &mut question);
        self.question = Some((socket, Cutter::default()));
        Ok(())
    }

    /// Reads the answer.
    fn hear(&mut self) {
        let Some((socket, cutter)) = &mut self.question else {
            return;
        };
        let mut bytes = [0; 1024];
        let count = match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => 0,
            Ok(count) => count,
        };
        cutter.push(&bytes[..count]);
        match cutter.next() {
            Ok(Some(message)) => {
                if protocol::answer(&message).is_some_and(|answer| answer.running) {
                    self.closed = false;
                }
            }
            Ok(None) if count > 0 => return,
            Ok(None) | Err(Foreign) => {}
        }
        self.question = None;
        self.again = Some(Instant::now() + ASK_AGAIN);
    }
}

/// One process's connection.
struct Link {
    worker: TcpStream,
    /// Made once the process has said something: the coordinator waits for the first words of
    /// whoever connects, and serves nobody meanwhile.
    coordinator: Option<OwnedFd>,
    /// What another rank's relay has said of the secret so far; nothing where none is asked for.
    greeting: Option<Vec<u8>>,
    /// Whether the other side is another rank's relay.
    is_rank: bool,
    address: Option<Ipv4Addr>,
    to_coordinator: Vec<u8>,
    to_worker: Vec<u8>,
    from_coordinator: Cutter,
    from_worker: Passage,
    /// The kind of its first message, once that has come.
    hello: Option<u32>,
    /// Whether it runs, and is not on its way back from a checkpoint or a restart.
    runs: bool,
    /// Whether a checkpoint was ordered that it has not come to a barrier for.
    ordered: bool,
    /// Whether a word of release was passed on that [`Carrier::note_released`] has not seen.
    released: bool,
    /// Whether others were released and it will be.
    awaits_release: bool,
    /// Messages for the worker that are held back, and all that came after them.
    held: Vec<Message>,
    worker_ended: bool,
    coordinator_ended: bool,
    /// Whether the coordinator was told that the worker has ended.
    told: bool,
}

impl Carrier {
    /// Serves until told to stop or the coordinator (`end`, a pidfd), if it is here, has ended.
    fn carry(&mut self, end: Option<&OwnedFd>) {
        loop {
            if self.shared.state().links != self.links.len() {
                self.shared.change(|state| {
                    state.links = self.links.len();
                    state.events += 1;
                });
            }
            let mut fds = vec![
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                match end {
                    Some(end) => PollFd::new(end.as_fd(), PollFlags::POLLIN),
                    None => PollFd::new(self.woken.as_fd(), PollFlags::empty()),
                },
                match &self.door {
                    Some(door) => PollFd::new(door.listener.as_fd(), PollFlags::POLLIN),
                    None => PollFd::new(self.woken.as_fd(), PollFlags::empty()),
                },
                match &self.gate.question {
                    Some((socket, _)) => PollFd::new(socket.as_fd(), PollFlags::POLLIN),
                    None => PollFd::new(self.woken.as_fd(), PollFlags::empty()),
                },
            ];
            for link in &self.links {
                // A side that has ended would be reported for ever; `woken` stands in for it.
                let worker = match link.worker_ended {
                    true => self.woken.as_fd(),
                    false => link.worker.as_fd(),
                };
                fds.push(PollFd::new(worker, link.worker_events()));
                let coordinator = match &link.coordinator {
                    Some(coordinator) if !link.coordinator_ended => coordinator.as_fd(),
                    _ => self.woken.as_fd(),
                };
                fds.push(PollFd::new(coordinator, link.coordinator_events()));
            }
            if let Err(errno) = nix::poll::poll(&mut fds, sys::until(self.gate.until()))
                && errno != Errno::EINTR
            {
                log::error!("cannot wait for DMTCP's processes: {errno}");
                return;
            }
            let ready: Vec<bool> = fds
                .iter()
                .map(|fd| fd.revents().is_some_and(|events| !events.is_empty()))
                .collect();
            drop(fds);

            if ready[0] {
                let mut bytes = [0; 64];
                // Only the waking counts.
                let _ = recv(self.woken.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT);
            }
            let release = {
                let state = self.shared.state();
                if state.stop {
                    return;
                }
                state.release
            };
            if ready[2] {
                self.shared.change(|state| state.coordinator_gone = true);
                return;
            }
            let secret = self.door.as_ref().map(|door| door.secret.as_bytes());
            for (index, link) in self.links.iter_mut().enumerate() {
                if ready[FIXED + 2 * index] {
                    link.read_worker(&self.shared, secret);
                }
            }
            if ready[4] {
                self.gate.hear();
            }
            self.tend_gate();
            for (index, link) in self.links.iter_mut().enumerate() {
                let waits = self.gate.closed && link.is_new();
                if link.coordinator.is_none() && !link.to_coordinator.is_empty() && !waits {
                    match self.upstream.connect() {
                        Ok(stream) => link.coordinator = Some(stream),
                        Err(error) => {
                            log::error!("cannot reach DMTCP's coordinator: {error}");
                            link.worker_ended = true;
                            link.coordinator_ended = true;
                        }
                    }
                }
                if ready[FIXED + 1 + 2 * index] && link.coordinator.is_some() {
                    link.read_coordinator(&self.shared, release);
                }
                link.settle(release);
            }
            self.note_released();
            for link in &mut self.links {
                link.write();
            }
            self.links.retain(|link| !link.over());
            if ready[1] {
                self.accept();
            }
            if ready[3] {
                self.accept_rank();
            }
        }
    }

    /// Notes which processes are on their way back. The first word to one of them is the word to
    /// all: those to the others follow.
    fn note_released(&mut self) {
        for index in 0..self.links.len() {
            if !std::mem::take(&mut self.links[index].released) {
                continue;
            }
            if !std::mem::take(&mut self.links[index].awaits_release) {
                for link in &mut self.links {
                    if link.is_process() && link.coordinator.is_some() {
                        link.awaits_release = true;
                        link.runs = false;
                    }
                }
                self.links[index].awaits_release = false;
            }
        }
    }

    /// Closes the gate while processes are on their way back, and has it opened after that.
    fn tend_gate(&mut self) {
        let Upstream::Coordinator(_) = self.upstream else {
            // Rank 0 sees all.
            return;
        };
        let mut links = self.links.iter();
        if links.any(|link| !link.runs && !link.worker_ended) {
            self.gate.closed = true;
            self.gate.question = None;
            self.gate.again = None;
        } else if self.gate.closed
            && self.gate.question.is_none()
            && self.gate.again.is_none_or(|again| Instant::now() >= again)
            && let Err(error) = self.gate.ask(&self.upstream)
        {
            log::warn!("cannot reach DMTCP's coordinator: {error}");
            self.gate.again = Some(Instant::now() + ASK_AGAIN);
        }
        if !self.gate.closed || !self.links.iter().any(Link::is_new) {
            self.gate.waiting = None;
            return;
        }
        let since = *self.gate.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() >= RETURNING {
            log::warn!(
                "a process did not come back from a checkpoint within {RETURNING:?}; new ones no \
                 longer wait for it"
            );
            for link in &mut self.links {
                link.runs = true;
                link.awaits_release = false;
            }
            self.gate = Gate::default();
        }
    }

    /// Lets a process in if it is the user's.
    fn accept(&mut self) {
        let (worker, peer) = match self.listener.accept() {
            Ok((worker, std::net::SocketAddr::V4(peer))) => (worker, peer),
            Ok(_) => return,
            Err(error) => {
                log::warn!("cannot accept a process of the application: {error}");
                return;
            }
        };
        let own = match worker.local_addr() {
            Ok(std::net::SocketAddr::V4(own)) => own,
            _ => return,
        };
        match super::peer::find(peer, own) {
            Ok(Some(peer)) if peer.uid == self.own => {}
            Ok(Some(peer)) => {
                let uid = peer.uid;
                log::warn!("refused a connection of user {uid} to the coordinator of this job");
                return;
            }
            // It has gone again.
            Ok(None) => return,
            Err(error) => {
                log::warn!("refused a connection to the coordinator, cannot tell whose: {error}");
                return;
            }
        }
        // DMTCP sends small messages and waits for the answer to each.
        if let Err(error) = worker.set_nodelay(true) {
            log::debug!("cannot set TCP_NODELAY: {error}");
        }
        self.links.push(Link::new(worker, self.address));
    }

    /// Lets another rank's relay to the door. It has to say the secret first.
    fn accept_rank(&mut self) {
        let Some(door) = &self.door else { return };
        let (stream, peer) = match door.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                log::warn!("cannot accept another rank: {error}");
                return;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("cannot set TCP_NODELAY: {error}");
        }
        let address = match peer.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        };
        let mut link = Link::new(stream, address);
        link.greeting = Some(Vec::new());
        self.links.push(link);
    }

    /// Ends the coordinator and removes its socket.
    fn finish(&mut self, coordinator: Option<Child>) {
        self.links.clear();
        if let Some(coordinator) = coordinator {
            self.end_coordinator(coordinator);
        }
        self.shared.change(|state| {
            state.coordinator_gone = true;
            state.links = 0;
        });
    }

    /// Tells the coordinator, of which `end` is a pidfd, to end, and waits for that.
    fn quit(&mut self, end: &OwnedFd) {
        self.links.clear();
        let told = self.upstream.connect().and_then(|socket| {
            let quit = protocol::question(protocol::Command::Quit);
            UnixStream::from(socket).write_all(&quit)
        });
        // It is killed next, if it has not ended.
        if let Err(error) =
            told.and_then(|()| sys::readable(end, Some(Instant::now() + ENDING)).map(drop))
        {
            log::debug!("DMTCP's coordinator: {error}");
        }
    }

    fn end_coordinator(&self, mut coordinator: Child) {
        // It has ended already in the one case; it is killed in the other.
        if let Err(error) = coordinator.kill() {
            log::debug!("DMTCP's coordinator: {error}");
        }
        if let Err(error) = coordinator.wait() {
            log::debug!("DMTCP's coordinator: {error}");
        }
        if let Upstream::Coordinator(dir) = &self.upstream
            && let Err(error) = std::fs::remove_file(short(dir))
        {
            log::debug!("the socket of DMTCP's coordinator: {error}");
        }
    }
}

impl Link {
    fn new(worker: TcpStream, address: Option<Ipv4Addr>) -> Link {
        Link {
            worker,
            coordinator: None,
            greeting: None,
            is_rank: false,
            address,
            to_coordinator: Vec::new(),
            to_worker: Vec::new(),
            from_coordinator: Cutter::default(),
            from_worker: Passage::default(),
            hello: None,
            runs: true,
            ordered: false,
            released: false,
            awaits_release: false,
            held: Vec::new(),
            worker_ended: false,
            coordinator_ended: false,
            told: false,
        }
    }

    /// Compares the start of what another rank's relay says with the secret. What follows the
    /// secret, or everything where none is asked for, is given back.
    fn greeted<'a>(&mut self, bytes: &'a [u8], secret: Option<&[u8]>) -> &'a [u8] {
        let Some(greeting) = &mut self.greeting else {
            return bytes;
        };
        let missing = SECRET - greeting.len();
        let (now, rest) = bytes.split_at(missing.min(bytes.len()));
        greeting.extend_from_slice(now);
        if greeting.len() == SECRET {
            if secret == Some(greeting.as_slice()) {
                self.is_rank = true;
                self.greeting = None;
            } else {
                log::warn!(
                    "refused a connection that does not know the secret of this job's ranks"
                );
                self.worker_ended = true;
                return &[];
            }
        }
        rest
    }

    fn worker_events(&self) -> PollFlags {
        let mut events = PollFlags::empty();
        if self.worker_ended {
            return events;
        }
        if self.to_coordinator.len() < WAITING_MAX {
            events |= PollFlags::POLLIN;
        }
        if !self.to_worker.is_empty() {
            events |= PollFlags::POLLOUT;
        }
        events
    }

    fn coordinator_events(&self) -> PollFlags {
        let mut events = PollFlags::empty();
        if self.coordinator.is_none() || self.coordinator_ended {
            return events;
        }
        if self.to_worker.len() < WAITING_MAX {
            events |= PollFlags::POLLIN;
        }
        if !self.to_coordinator.is_empty() {
            events |= PollFlags::POLLOUT;
        }
        events
    }

    fn read_worker(&mut self, shared: &Shared, secret: Option<&[u8]>) {
        let mut bytes = [0; 16384];
        let count = match recv(self.worker.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(_) => {
                self.worker_ended = true;
                return;
            }
            Ok(count) => count,
        };
        // DMTCP writes a message in two pieces; its kernel sends the second one only once the first
        // is acknowledged, which ours would do after 40 ms. Has to be said again every time.
        if let Err(error) = self.worker.set_quickack(true) {
            log::debug!("cannot set TCP_QUICKACK: {error}");
        }
        let mut kinds = Vec::new();
        let bytes = self.greeted(&bytes[..count], secret);
        let passed = self
            .from_worker
            .pass(bytes, &mut self.to_coordinator, &mut kinds);
        if passed == Err(Foreign) {
            return self.foreign(shared);
        }
        for kind in kinds {
            self.hello.get_or_insert(kind);
            match kind {
                kind::USER_COMMAND if !self.is_rank => {
                    log::warn!("refused a dmtcp_command: this job's checkpoints are the helper's");
                    self.to_coordinator.clear();
                    self.worker_ended = true;
                    self.coordinator_ended = true;
                    return;
                }
                kind::RESTART_WORKER => self.runs = false,
                kind::BARRIER => self.ordered = false,
                kind::WORKER_RESUMING => {
                    self.runs = true;
                    shared.change(|state| {
                        state.events += 1;
                        state.resumed += 1;
                    });
                }
                _ => {}
            }
        }
    }

    /// Whether this is a new process that the coordinator does not know of yet.
    fn is_new(&self) -> bool {
        self.hello == Some(kind::NEW_WORKER) && self.coordinator.is_none()
    }

    /// Whether this is a process of the application, and not one of its side channels.
    fn is_process(&self) -> bool {
        matches!(self.hello, Some(kind::NEW_WORKER | kind::RESTART_WORKER))
    }

    fn read_coordinator(&mut self, shared: &Shared, release: Release) {
        let Some(coordinator) = &self.coordinator else {
            return;
        };
        let mut bytes = [0; 16384];
        match recv(coordinator.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.coordinator_ended = true,
            Ok(count) => self.from_coordinator.push(&bytes[..count]),
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Err(_) => self.coordinator_ended = true,
        }
        loop {
            match self.from_coordinator.next() {
                Ok(Some(message)) => {
                    let written = is_written(&message);
                    if written {
                        shared.change(|state| state.written += 1);
                    }
                    if written && release == Release::Drop {
                        continue;
                    }
                    if !self.held.is_empty() || (written && release == Release::Hold) {
                        self.held.push(message);
                    } else {
                        self.pass(message);
                    }
                }
                Ok(None) => return,
                Err(Foreign) => return self.foreign(shared),
            }
        }
    }

    /// Does with what is held as is wanted now.
    fn settle(&mut self, release: Release) {
        if release == Release::Hold {
            return;
        }
        for message in std::mem::take(&mut self.held) {
            if release == Release::Pass || !is_written(&message) {
                self.pass(message);
            }
        }
    }

    fn pass(&mut self, mut message: Message) {
        // The coordinator sees all processes behind one socket and cannot know where they are.
        if message.kind() == kind::ACCEPT
            && let Some(address) = self.address
        {
            message.set_address(address);
        }
        self.released |= is_written(&message);
        if message.kind() == kind::DO_CHECKPOINT {
            if self.ordered && self.has_unread() {
                return;
            }
            self.ordered = true;
        }
        self.to_worker.extend_from_slice(&message.0);
    }

    /// Whether something that was sent to the process is still to be read by it. Where that cannot
    /// be known (it is on another node), no.
    fn has_unread(&self) -> bool {
        if !self.to_worker.is_empty() {
            return true;
        }
        let (Ok(SocketAddr::V4(peer)), Ok(SocketAddr::V4(own))) =
            (self.worker.peer_addr(), self.worker.local_addr())
        else {
            return false;
        };
        match super::peer::find(peer, own) {
            Ok(found) => found.is_some_and(|peer| peer.unread as usize >= protocol::MESSAGE),
            Err(error) => {
                log::debug!("cannot tell what a process has not read: {error}");
                false
            }
        }
    }

    fn foreign(&mut self, shared: &Shared) {
        log::warn!("ended a connection that does not speak the protocol of DMTCP 3.2 to 4.2");
        self.worker_ended = true;
        self.coordinator_ended = true;
        shared.change(|state| state.foreign = true);
    }

    fn write(&mut self) {
        if let Some(coordinator) = &self.coordinator {
            if !flush(coordinator.as_raw_fd(), &mut self.to_coordinator) {
                self.coordinator_ended = true;
            }
            if self.worker_ended && self.to_coordinator.is_empty() && !self.told {
                self.told = true;
                // It reads the end; we read on until it has closed its side, so that it never
                // writes into a closed socket.
                if let Err(error) = shutdown(coordinator.as_raw_fd(), Shutdown::Write) {
                    log::debug!("DMTCP's coordinator: {error}");
                }
            }
        }
        if self.worker_ended {
            self.to_worker.clear();
        } else if !flush(self.worker.as_raw_fd(), &mut self.to_worker) {
            self.worker_ended = true;
        }
    }

    fn over(&self) -> bool {
        match &self.coordinator {
            None => self.worker_ended,
            Some(_) => self.coordinator_ended && (self.to_worker.is_empty() || self.worker_ended),
        }
    }
}

/// Whether this lets a process go on after all have written.
fn is_written(message: &Message) -> bool {
    message.kind() == kind::BARRIER_RELEASED && message.extra() == protocol::WRITTEN
}

/// Sends what fits; false when the other side has gone.
fn flush(fd: i32, bytes: &mut Vec<u8>) -> bool {
    while !bytes.is_empty() {
        match send(fd, bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
            Ok(count) => drop(bytes.drain(..count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return true,
            Err(_) => {
                bytes.clear();
                return false;
            }
        }
    }
    true
}
