//! What a saved application needs around it: the files it has open, the ports it listens at.
//!
//! Contract: [`Outside::look`] is called while every process is held, and only looks. [`ready`] is
//! asked before a restart: it names what is missing, before anything is started and with nothing
//! changed, and waits for ports that the kernel still keeps for connections that have ended.
//!
//! Of the application's files only those count that are the node's own at the same path: whether one
//! in a container image or behind a bind to another path is there can be seen in the container alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt,
    socket, sockopt,
};
use nix::unistd::Pid;

use crate::engine::Kind;
use crate::engine::criu::files::writes;
use crate::engine::processes;
use crate::listeners::{listeners, socket_inode};
use crate::store::{Manifest, OpenFile, StreamEnd, escape, unescape};

/// Most files and ports that are remembered.
const MOST: usize = 4096;

/// The kernel keeps a connection that this side closed for 60 s (TIME_WAIT, TCP_TIMEWAIT_LEN), and
/// the port with it.
const CLOSING: Duration = Duration::from_secs(75);
const LOOK: Duration = Duration::from_millis(200);

/// Where open files are never looked for: they are made anew, or are no files.
const NOT_KEPT: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// See the module.
#[derive(Debug, Default)]
pub struct Outside {
    /// Files that it has open, and their sizes if it writes them, else 0.
    pub needs: Vec<OpenFile>,
    /// Those that it writes, with their sizes.
    pub writes: Vec<OpenFile>,
    pub listens: Vec<SocketAddr>,
    pub output: Vec<StreamEnd>,
}

impl Outside {
    /// Looks at `root` and all below it. Nothing below one of the paths `own` counts, nor this
    /// process's own output.
    pub fn look(root: Pid, own: &[PathBuf]) -> Outside {
        let streams: Vec<(u64, u64)> = ["/proc/self/fd/1", "/proc/self/fd/2"]
            .iter()
            .filter_map(|path| fs::metadata(path).ok())
            .map(|about| (about.dev(), about.ino()))
            .collect();
        let mut files: BTreeMap<PathBuf, Option<u64>> = BTreeMap::new();
        let mut sockets = BTreeSet::new();
        let network = fs::read_link("/proc/self/ns/net").ok();
        let mut table = None;
        for process in processes::tree(root) {
            let process = PathBuf::from(format!("/proc/{}", process.pid));
            // One that has ended has nothing open.
            let Ok(open) = fs::read_dir(process.join("fd")) else {
                continue;
            };
            if table.is_none() && fs::read_link(process.join("ns/net")).ok() == network {
                table = Some(process.clone());
            }
            for entry in open.flatten() {
                let Ok(link) = fs::read_link(entry.path()) else {
                    continue;
                };
                if let Some(inode) = socket_inode(&link) {
                    sockets.insert(inode);
                    continue;
                }
                let Some(size) = size_of_own(&entry.path(), &link, own, &streams) else {
                    continue;
                };
                let info = process.join("fdinfo").join(entry.file_name());
                let writes = fs::read_to_string(info).is_ok_and(|info| writes(&info));
                let known = files.entry(link).or_default();
                if writes {
                    *known = Some(size);
                }
            }
        }
        let listens = table.map_or_else(Vec::new, |process| {
            let mut found = Vec::new();
            for name in ["tcp", "tcp6"] {
                let text = fs::read_to_string(process.join("net").join(name)).unwrap_or_default();
                let ours = listeners(&text).filter(|found| sockets.contains(&found.inode));
                found.extend(ours.map(|found| found.address));
            }
            found
        });
        let record = |(path, size): (&PathBuf, u64)| OpenFile {
            path: escape(path.as_os_str()),
            size,
        };
        let few = files.iter().take(MOST);
        Outside {
            needs: few
                .clone()
                .map(|(path, size)| record((path, size.unwrap_or(0))))
                .collect(),
            writes: few
                .filter_map(|(path, size)| Some(record((path, (*size)?))))
                .collect(),
            listens: listens.into_iter().take(MOST).collect(),
            output: Vec::new(),
        }
    }
}

/// The size of the regular file behind a descriptor, if it is this node's at the path `link`.
fn size_of_own(
    descriptor: &Path,
    link: &Path,
    own: &[PathBuf],
    streams: &[(u64, u64)],
) -> Option<u64> {
    let about = fs::metadata(descriptor).ok()?;
    let number = (about.dev(), about.ino());
    let hidden = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // What NFS makes of a file that is deleted while it is open.
        name.starts_with(".nfs")
    };
    if !about.is_file()
        || about.nlink() == 0
        || streams.contains(&number)
        || hidden(link)
        || NOT_KEPT.iter().any(|dir| link.starts_with(dir))
        || own.iter().any(|path| link.starts_with(path))
    {
        return None;
    }
    let here = fs::metadata(link).ok()?;
    ((here.dev(), here.ino()) == number).then_some(about.len())
}

/// What a generation needs and this node does not have, a sentence each. Waits until ports are free
/// that only ended connections keep, for as long as `go_on` says so.
pub fn missing(manifest: &Manifest, go_on: &dyn Fn() -> bool) -> Vec<String> {
    let mut missing: Vec<String> = manifest.needs.iter().filter_map(file).collect();
    let begun = Instant::now();
    let mut told = false;
    for address in &manifest.listens {
        loop {
            match port(*address) {
                Port::Free => break,
                // CRIU gives a socket the option that lets it have such a port; DMTCP does not, says
                // nothing, and the program then listens somewhere else (seen with 4.1.1).
                Port::Closing if manifest.engine != Kind::Dmtcp => break,
                Port::Closing if begun.elapsed() < CLOSING && go_on() => {
                    if !told {
                        log::info!(
                            "port {} still has connections that are ending: it is free in a minute \
                             at most",
                            address.port()
                        );
                        told = true;
                    }
                    std::thread::sleep(LOOK);
                }
                Port::Closing | Port::Taken => {
                    missing.push(format!(
                        "it listens at port {}, which another program on this node has now: end \
                         that, or use another node",
                        address.port()
                    ));
                    break;
                }
                Port::Unknown(why) => {
                    log::warn!("the application listens at {address}, which may fail here: {why}");
                    break;
                }
            }
        }
    }
    missing
}

/// What is wrong with a file, if something is.
fn file(needed: &OpenFile) -> Option<String> {
    let path = PathBuf::from(unescape(&needed.path)?);
    let shown = path.display();
    let why = match fs::metadata(&path) {
        Ok(about) if !about.is_file() => format!("{shown} is no regular file any more"),
        Ok(about) if about.len() < needed.size => format!(
            "{shown} had {} bytes and has only {} now",
            needed.size,
            about.len()
        ),
        Ok(_) => return None,
        Err(why) => format!("{shown} cannot be found ({why})"),
    };
    let nodes_own = ["/tmp", "/var/tmp"].iter().any(|dir| path.starts_with(dir));
    let hint = if nodes_own {
        "; it is in a directory that every node has for itself: use a shared one"
    } else {
        ""
    };
    Some(format!("{why}{hint}"))
}

enum Port {
    Free,
    /// Nobody listens, but connections are not quite gone.
    Closing,
    Taken,
    Unknown(nix::errno::Errno),
}

/// Whether a program can begin to listen at an address now.
fn port(address: SocketAddr) -> Port {
    use nix::errno::Errno;
    match try_port(address, false) {
        Ok(()) => Port::Free,
        Err(Errno::EADDRINUSE) => match try_port(address, true) {
            Ok(()) => Port::Closing,
            Err(_) => Port::Taken,
        },
        Err(why) => Port::Unknown(why),
    }
}

fn try_port(address: SocketAddr, reuse: bool) -> nix::Result<()> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &reuse)?;
    match address {
        SocketAddr::V4(address) => bind(socket.as_raw_fd(), &SockaddrIn::from(address))?,
        SocketAddr::V6(address) => bind(socket.as_raw_fd(), &SockaddrIn6::from(address))?,
    }
    listen(&socket, Backlog::new(1)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn open_files_and_ports_of_this_process_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("own")).unwrap();
        for name in ["read", "written", "own/hidden"] {
            fs::write(path(name), "12345").unwrap();
        }
        let _read = fs::File::open(path("read")).unwrap();
        let _hidden = fs::File::open(path("own/hidden")).unwrap();
        let _written = fs::OpenOptions::new()
            .append(true)
            .open(path("written"))
            .unwrap();
        let _deleted = tempfile::tempfile_in(dir.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let seen = Outside::look(Pid::this(), &[path("own")]);
        let sizes = |files: &[OpenFile]| -> Vec<(String, u64)> {
            // Other tests have files open as well.
            let ours = files
                .iter()
                .filter(|file| Path::new(&file.path).starts_with(dir.path()));
            ours.map(|file| (file.path.clone(), file.size)).collect()
        };
        let shown = |name: &str| path(name).display().to_string();
        assert_eq!(
            sizes(&seen.needs),
            [(shown("read"), 0), (shown("written"), 5)]
        );
        assert_eq!(sizes(&seen.writes), [(shown("written"), 5)]);
        assert!(seen.listens.contains(&listener.local_addr().unwrap()));
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let needed = |size| OpenFile {
            path: escape(path.as_os_str()),
            size,
        };
        let said = file(&needed(0)).unwrap();
        assert!(said.contains("data cannot be found"), "{said}");
        fs::write(&path, "123").unwrap();
        assert_eq!(file(&needed(3)), None);
        let said = file(&needed(5)).unwrap();
        assert!(said.contains("had 5 bytes and has only 3 now"), "{said}");
        let said = file(&OpenFile {
            path: "/tmp/no-such-file/at-all".into(),
            size: 0,
        });
        assert!(said.unwrap().contains("every node has for itself"));
    }

    #[test]
    fn a_port_is_free_taken_or_closing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(matches!(port(address), Port::Taken));
        let mut client = TcpStream::connect(address).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        drop(listener);
        // The side that closes first keeps the port.
        server.write_all(b"x").unwrap();
        drop(server);
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        drop(client);
        assert!(matches!(port(address), Port::Closing));
    }
}
