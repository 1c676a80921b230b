//! A cluster's directory on this host: made, filled and, where a cluster was torn down by force,
//! swept.
//!
//! ```text
//! clusters/lab-XXXXXX/       upper, work   the overlay's own
//!                            root          where it is mounted, seen by the cluster alone
//!                            plain         home, tmp, var/tmp, nodes: bound into the cluster
//!                            freezer       control groups, mounted for the outermost script alone
//! clusters/lab-XXXXXX.lock   held while the cluster runs
//! clusters/lock              held while one is made, or looked at whether it still runs
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::USERS;
use crate::cache;
use crate::conf::{self, Spec};

/// Directories of the host's own file system below the cluster's directory.
const PLAIN: [&str; 4] = ["home", "tmp", "var/tmp", "nodes"];

/// A new directory for a cluster, and a lock that keeps others from taking it for a leftover until
/// its own script holds the lock file. Sweeps what clusters have left whose scripts were killed.
pub fn make_directory() -> Result<(PathBuf, fs::File)> {
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
pub fn remove_leftovers(directory: &Path) {
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
pub fn lay_out(spec: &Spec, directory: &Path, root: &Path) -> Result<()> {
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
