//! The container images of the tests: small Debian bookworm trees, built by Apptainer.
//!
//! None holds libatomic: DMTCP's need of it is the product's to meet.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Entry};
use crate::root::{self, Bootstrap, Release, run_quietly};

const ITERATE: &str = include_str!("../programs/iterate.c");
const COUNTER: &str = include_str!("../programs/counter.c");

/// What all image trees lose: it only makes them slower to pack.
const TRIM: &str = r#"
rm -rf "$1/usr/share/i18n" "$1/var/lib/apt/lists"/* "$1/var/cache"/*
"#;

/// Packs the tree with the fastest compressor that squashfuse reads.
const BUILD: &str = "apptainer build --mksquashfs-args '-comp lz4' /tmp/image.sif /tmp/tree";

/// A directory with all images: `python.sif` (Python and NumPy), `openmp.sif` (`/usr/bin/iterate`)
/// and `static.sif` (`/usr/bin/counter` and busybox; no dynamic program).
pub fn images() -> Result<Entry> {
    let recipe = [ITERATE, COUNTER, TRIM, BUILD, include_str!("image.rs")].concat();
    cache::entry("images", &recipe, |directory| {
        let scratch = directory.join("scratch");
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        std::thread::scope(|scope| {
            let makers: [fn(&Path) -> Result<&'static str>; 3] = [python, openmp, statics];
            let threads = makers.map(|make| {
                let scratch = &scratch;
                scope.spawn(move || {
                    let work = scratch.join(format!("{:?}", std::thread::current().id()));
                    fs::create_dir(&work)
                        .with_context(|| format!("cannot create {}", work.display()))?;
                    let tree = work.join("tree");
                    fs::create_dir(&tree)
                        .with_context(|| format!("cannot create {}", tree.display()))?;
                    let name = make(&tree)?;
                    let root = root::root(Release::Trixie)?;
                    pack(&root.path, &work, &directory.join(name))
                        .with_context(|| format!("cannot build {name}"))
                })
            });
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a builder panicked")))
            })
        })?;
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
    })
}

fn python(tree: &Path) -> Result<&'static str> {
    let mut bootstrap = Bootstrap::new("bookworm", "essential", "python3,python3-numpy,libstdc++6");
    bootstrap.customize_hook = TRIM;
    bootstrap.run(tree)?;
    Ok("python.sif")
}

fn openmp(tree: &Path) -> Result<&'static str> {
    let mut bootstrap = Bootstrap::new("bookworm", "essential", "libgomp1,libstdc++6");
    bootstrap.customize_hook = TRIM;
    bootstrap.run(tree)?;
    compile(
        "gcc",
        &["-O2", "-fopenmp"],
        ITERATE,
        &tree.join("usr/bin/iterate"),
    )?;
    Ok("openmp.sif")
}

fn statics(tree: &Path) -> Result<&'static str> {
    Bootstrap::new("bookworm", "extract", "busybox-static").run(tree)?;
    for directory in [
        "usr/bin", "bin", "etc", "tmp", "var/tmp", "proc", "sys", "dev", "home", "root",
    ] {
        let path = tree.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    // Apptainer adds the user to these, and warns where they are missing.
    for file in ["etc/passwd", "etc/group"] {
        let path = tree.join(file);
        fs::write(&path, "").with_context(|| format!("cannot create {}", path.display()))?;
    }
    let busybox = if tree.join("bin/busybox").exists() {
        "/bin/busybox"
    } else {
        "/usr/bin/busybox"
    };
    for name in ["sh", "cat", "sleep", "ls", "id", "env", "true"] {
        let link = tree.join("bin").join(name);
        std::os::unix::fs::symlink(busybox, &link)
            .with_context(|| format!("cannot create {}", link.display()))?;
    }
    compile(
        "musl-gcc",
        &["-O2", "-static"],
        COUNTER,
        &tree.join("usr/bin/counter"),
    )?;
    Ok("static.sif")
}

fn compile(compiler: &str, flags: &[&str], source: &str, program: &Path) -> Result<()> {
    let mut file = tempfile::Builder::new()
        .suffix(".c")
        .tempfile()
        .context("cannot create a temporary file for a source text")?;
    std::io::Write::write_all(&mut file, source.as_bytes())
        .with_context(|| format!("cannot write {}", file.path().display()))?;
    let mut command = Command::new(compiler);
    command.args(flags).arg("-o").arg(program).arg(file.path());
    run_quietly(
        &mut command,
        &format!("{compiler} (tests/setup.sh installs it)"),
    )
}

/// Builds `image` of `work/tree` with the Apptainer of `root`.
fn pack(root: &Path, work: &Path, image: &Path) -> Result<()> {
    const SCRIPT: &str = r#"set -eu
mkdir "$LAB_WORK/upper" "$LAB_WORK/overlay" "$LAB_WORK/root" "$LAB_WORK/tmp"
root=$LAB_WORK/root
mount -t overlay -o "lowerdir=$LAB_ROOT,upperdir=$LAB_WORK/upper,workdir=$LAB_WORK/overlay" lab "$root"
mount --bind "$LAB_WORK" "$root/tmp"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
cd "$root"
pivot_root . .
umount -l .
cd /
export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/tmp/tmp
exec sh -c "$LAB_BUILD"
"#;
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--propagation",
            "private",
            "--",
        ])
        .args(["/bin/sh", "-c", SCRIPT])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LAB_WORK", work)
        .env("LAB_ROOT", root)
        .env("LAB_BUILD", BUILD);
    run_quietly(&mut command, "apptainer build")?;
    let built = work.join("image.sif");
    fs::rename(&built, image).with_context(|| format!("cannot move {}", built.display()))?;
    fs::set_permissions(image, fs::Permissions::from_mode(0o644))
        .with_context(|| format!("cannot set the mode of {}", image.display()))
}
