//! Findings about containers: the image, and what the node needs to start one.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::state::Last;
use super::{Findings, Level, Of};
use crate::config::Config;
use crate::container::installed::Installed;
use crate::container::sif::{self, Format};
use crate::container::{Place, image};
use crate::engine::criu::probe;
use crate::store::Store;
use crate::task::{self, Request};

use Level::{Problem, Warning};

/// What happens to a job without an image that can be used.
const ANOTHER_IMAGE: &str = "name another image, or copy or build it anew";

/// Largest image that is hashed at submission, in bytes: a second or two.
const HASHED_MAX: u64 = 1 << 30;

/// Image, Apptainer and what it needs; where the command can be looked at.
pub fn place(
    request: &Request,
    config: &Config,
    last: &Last,
    submission: bool,
    store: &Store,
    found: &mut Findings,
) -> Option<Place> {
    let Some(image) = &request.image else {
        return Some(Place::Bare);
    };
    let image = match task::image_path(image) {
        Ok(image) => whole(image, last, submission, store, found)?,
        Err(why) => {
            let cure = match image.to_string_lossy().contains("://") {
                true => "name that file instead; every node has to see it there",
                false => task::MISSING_IMAGE,
            };
            found.told(Problem, Of::Job, "image", &format!("{why:#}"), cure);
            return None;
        }
    };
    let program = match task::apptainer(request, config) {
        Ok(program) => program,
        Err(why) => {
            found.told(
                Problem,
                Of::Node,
                "apptainer",
                &why.to_string(),
                "install Apptainer",
            );
            return None;
        }
    };
    let installed = apptainer(&program, found)?;
    if image.is_file() {
        fuse(&installed, found);
    }
    if !installed.setuid {
        namespaces("containers", Problem, found);
    }
    if !installed.user_binds {
        return None;
    }
    match task::place(request, config) {
        Ok(place) => Some(place),
        Err(why) => {
            found.told(
                Problem,
                Of::Job,
                "image",
                &format!("{why:#}"),
                ANOTHER_IMAGE,
            );
            None
        }
    }
}

/// Whether an image is whole, and still the one that the name's state was saved with.
fn whole(
    image: PathBuf,
    last: &Last,
    submission: bool,
    store: &Store,
    found: &mut Findings,
) -> Option<PathBuf> {
    let shown = image.display();
    let kind = if image.is_dir() {
        "a directory"
    } else {
        match sif::check(&image) {
            Ok(Format::Sif) => "a SIF file, whole by its header",
            Ok(Format::Squashfs) => "a squashfs file",
            Ok(Format::Ext3) => "an ext3 file",
            Err(why) => {
                found.add(
                    Problem,
                    Of::Job,
                    "image",
                    format!("{shown}: {why}"),
                    ANOTHER_IMAGE,
                );
                return None;
            }
        }
    };
    let saved = last.goes_on.as_ref().and_then(|last| last.image.as_ref());
    // Nobody waits for gigabytes to be hashed at submission.
    let small = || std::fs::metadata(&image).is_ok_and(|seen| seen.len() <= HASHED_MAX);
    let saved = saved.filter(|_| !submission || small());
    if let Some(saved) = saved {
        match image::digest(&image, &store.image_memory()) {
            Ok(digest) if digest.to_string() != saved.digest => {
                let cause = format!(
                    "{shown} is not the image that the saved state belongs to: a restart is refused"
                );
                let cure = "put the old image back, begin anew with \
                            --container-checkpoint-restart=fresh, or try =force";
                found.add(Problem, Of::Job, "image", cause, cure);
                return Some(image);
            }
            Ok(_) => {}
            Err(why) => {
                found.add(Problem, Of::Job, "image", why.to_string(), ANOTHER_IMAGE);
                return None;
            }
        }
    }
    found.ok(Of::Job, "image", format!("{shown} is {kind}"));
    Some(image)
}

/// Apptainer itself, and whether anything can be put into its containers.
pub fn apptainer(program: &Path, found: &mut Findings) -> Option<Installed> {
    let installed = match Installed::ask(program) {
        Ok(installed) => installed,
        Err(why) => {
            found.add(
                Problem,
                Of::Node,
                "apptainer",
                why,
                "install Apptainer anew",
            );
            return None;
        }
    };
    let conf = installed.conf.as_deref().map(Path::display);
    match (installed.user_binds, conf) {
        (false, Some(conf)) => found.add(
            Problem,
            Of::Node,
            "apptainer",
            format!("{conf} says `user bind control = no`: nothing can be put into containers"),
            "ask the administrator for `user bind control = yes` there",
        ),
        _ => {
            let how = if installed.setuid { ", setuid" } else { "" };
            let text = format!("{} ({}{how})", installed.version, program.display());
            found.ok(Of::Node, "apptainer", text);
        }
    }
    Some(installed)
}

/// Whether SIF files can be mounted.
pub fn fuse(installed: &Installed, found: &mut Findings) {
    let device = Path::new("/dev/fuse");
    let opened = File::options().read(true).write(true).open(device);
    // Root may open it whatever its mode.
    let opened = opened.and_then(|file| match file.metadata()?.mode() & 0o006 {
        0o006 => Ok(()),
        _ if nix::unistd::geteuid().is_root() => Err(io::ErrorKind::PermissionDenied.into()),
        _ => Ok(()),
    });
    match opened {
        Ok(()) => found.ok(Of::Node, "fuse", "/dev/fuse can be used"),
        Err(why) => {
            // Setuid installations may mount by the kernel, the others unpack the image each time.
            let otherwise = if installed.setuid {
                "Apptainer may have to unpack SIF images at each start"
            } else {
                "Apptainer unpacks SIF images at each start"
            };
            let cause = format!("cannot use /dev/fuse: {why}; {otherwise}");
            let cure = "load the kernel's module fuse and give /dev/fuse the mode 0666, or use a \
                        sandbox directory as the image";
            found.add(Warning, Of::Node, "fuse", cause, cure);
        }
    }
}

/// Whether user namespaces can be made, for `whom`.
pub fn namespaces(whom: &str, level: Level, found: &mut Findings) {
    const CURE: &str = "set user.max_user_namespaces above 0 and, where they are there, \
                        kernel.unprivileged_userns_clone=1 and \
                        kernel.apparmor_restrict_unprivileged_userns=0 (sysctl)";
    if let Some(switch) = probe::namespaces_off() {
        let cause = format!("user namespaces, which {whom} need, are off: {switch} is 0");
        return found.add(level, Of::Node, "userns", cause, CURE);
    }
    // Switches are not all there is: AppArmor lets a namespace be made and forbids to use it.
    let tried = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "true"])
        .stdin(std::process::Stdio::null())
        .output();
    match tried {
        Ok(out) if !out.status.success() => {
            let said = String::from_utf8_lossy(&out.stderr);
            let cause = format!(
                "user namespaces, which {whom} need, cannot be made: {}",
                said.trim()
            );
            found.add(level, Of::Node, "userns", cause, CURE);
        }
        Ok(_) => found.ok(Of::Node, "userns", "user namespaces can be made"),
        Err(why) => found.add(
            Warning,
            Of::Node,
            "userns",
            format!("cannot run unshare, which tries out user namespaces: {why}"),
            "install util-linux",
        ),
    }
}
