//! Root file systems with a Slurm of three generations, made by mmdebstrap.
//!
//! All but the newest stand on Debian trixie, so that one and the same Apptainer (of sid) and a CRIU
//! that works on current kernels run beside each Slurm.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Entry};

/// Which Slurm a cluster runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Release {
    /// Slurm 22.05 (Debian bookworm's packages).
    OldSlurm,
    /// Slurm 24.11 (Debian trixie).
    Trixie,
    /// Slurm 26.05 (Debian sid).
    Sid,
}

impl Release {
    pub const ALL: [Release; 3] = [Release::OldSlurm, Release::Trixie, Release::Sid];

    /// The name on the command line and in the cache.
    pub fn name(self) -> &'static str {
        match self {
            Release::OldSlurm => "old-slurm",
            Release::Trixie => "trixie",
            Release::Sid => "sid",
        }
    }

    /// The release of that [`Release::name`].
    pub fn from_name(name: &str) -> Option<Release> {
        Release::ALL
            .into_iter()
            .find(|release| release.name() == name)
    }

    fn suite(self) -> &'static str {
        match self {
            Release::OldSlurm | Release::Trixie => "trixie",
            Release::Sid => "sid",
        }
    }

    fn further_suites(self) -> &'static [&'static str] {
        match self {
            Release::OldSlurm => &["sid", "bookworm"],
            Release::Trixie => &["sid"],
            Release::Sid => &[],
        }
    }

    /// apt preferences: what comes from a suite other than the base.
    fn preferences(self) -> String {
        let from = |packages: &str, suite: &str, priority: i32| {
            format!("Package: {packages}\nPin: release n={suite}\nPin-Priority: {priority}\n\n")
        };
        let mut text: String = self
            .further_suites()
            .iter()
            .map(|s| from("*", s, 100))
            .collect();
        if self.suite() != "sid" {
            text += &from("apptainer", "sid", 990);
        }
        if self == Release::OldSlurm {
            text += &from("slurm* libslurm*", "bookworm", 990);
        }
        text
    }
}

/// libatomic1 is what DMTCP's programs need on a node; images do without it on purpose.
const PACKAGES: &str = "slurmctld,slurmd,slurm-client,munge,criu,apptainer,squashfuse,\
fuse-overlayfs,fuse2fs,gocryptfs,uidmap,python3-minimal,procps,iproute2,ca-certificates,libatomic1,libstdc++6";

/// Debian's adduser refuses to run in a half-installed system when an older release's maintainer
/// script calls it, so Slurm's user is there beforehand (the number is Debian's own).
const ESSENTIAL_HOOK: &str = r#"
echo 'slurm:x:64030:64030::/nonexistent:/usr/sbin/nologin' >>"$1/etc/passwd"
echo 'slurm:x:64030:' >>"$1/etc/group"
"#;

/// alice and bob as Debian's useradd makes them; carol without subordinate ids.
const CUSTOMIZE_HOOK: &str = r#"
for user in alice:1001 bob:1002 carol:1003; do
    name=${user%:*} id=${user#*:}
    chroot "$1" groupadd -g "$id" "$name"
    chroot "$1" useradd -u "$id" -g "$id" -d "/home/$name" -s /bin/bash -M "$name"
done
printf 'alice:100000:65536\nbob:165536:65536\n' >"$1/etc/subuid"
printf 'alice:100000:65536\nbob:165536:65536\n' >"$1/etc/subgid"
rm -f "$1/etc/munge/munge.key" "$1/etc/resolv.conf" "$1/etc/hostname"
: >"$1/etc/resolv.conf"
ln -sf /usr/share/zoneinfo/Etc/UTC "$1/etc/localtime"
mkdir -p "$1/images"
rm -rf "$1/var/lib/apt/lists"/*
"#;

/// The root file system of a release; the first call takes about half a minute.
pub fn root(release: Release) -> Result<Entry> {
    let preferences = release.preferences();
    let recipe = format!(
        "{:?} {PACKAGES} {preferences} {ESSENTIAL_HOOK} {CUSTOMIZE_HOOK} {UNWANTED:?}",
        (release.suite(), release.further_suites())
    );
    cache::entry(&format!("root-{}", release.name()), &recipe, |path| {
        let mut bootstrap = Bootstrap::new(release.suite(), "minbase", PACKAGES);
        bootstrap.further_suites = release.further_suites();
        bootstrap.preferences = &preferences;
        bootstrap.essential_hook = ESSENTIAL_HOOK;
        bootstrap.customize_hook = CUSTOMIZE_HOOK;
        bootstrap.run(path)
    })
}

/// Directories that no test needs and that take time to unpack.
const UNWANTED: [&str; 3] = ["/usr/share/doc", "/usr/share/man", "/usr/share/locale"];

/// One call of mmdebstrap.
pub(crate) struct Bootstrap<'a> {
    suite: &'a str,
    variant: &'a str,
    packages: &'a str,
    pub further_suites: &'a [&'a str],
    pub preferences: &'a str,
    pub essential_hook: &'a str,
    pub customize_hook: &'a str,
}

impl<'a> Bootstrap<'a> {
    pub fn new(suite: &'a str, variant: &'a str, packages: &'a str) -> Self {
        Bootstrap {
            suite,
            variant,
            packages,
            further_suites: &[],
            preferences: "",
            essential_hook: "",
            customize_hook: "",
        }
    }

    /// Fills the empty directory `path`.
    pub fn run(&self, path: &Path) -> Result<()> {
        let mirror = mirror()?;
        let preferences = path.join("etc/apt/preferences.d/lab");
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--quiet", "--mode=root", "--format=directory"])
            .arg(format!("--variant={}", self.variant))
            .arg(format!("--include={}", self.packages))
            // A mirror may hold a snapshot older than its validity; signatures are checked.
            .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg("--aptopt=Acquire::Languages \"none\"")
            .args(UNWANTED.map(|path| format!("--dpkgopt=path-exclude={path}/*")))
            .env("LAB_PREFERENCES", self.preferences)
            .env("LAB_PREFERENCES_FILE", &preferences)
            .arg("--setup-hook=printf %s \"$LAB_PREFERENCES\" >\"$LAB_PREFERENCES_FILE\"");
        for (hook, text) in [
            ("essential", self.essential_hook),
            ("customize", self.customize_hook),
        ] {
            if !text.is_empty() {
                command.arg(format!("--{hook}-hook=set -eu\n{text}"));
            }
        }
        command.arg(self.suite).arg(path);
        for suite in [self.suite].iter().chain(self.further_suites) {
            command.arg(format!("deb {mirror} {suite} main"));
        }
        run_quietly(&mut command, "mmdebstrap (tests/setup.sh installs it)")
    }
}

/// The Debian archive this machine installs from: `CONTAINER_CHECKPOINT_LAB_MIRROR`, or what apt is
/// set up with.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("CONTAINER_CHECKPOINT_LAB_MIRROR") {
        return Ok(mirror);
    }
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(RELEASE) $(COMPONENT) $(REPO_URI)",
        ])
        .arg("Identifier: Packages")
        .output()
        .context("cannot run apt-get to find this machine's Debian mirror")?;
    choose_mirror(&String::from_utf8_lossy(&output.stdout)).context(
        "found no Debian archive in this machine's apt sources; set \
         CONTAINER_CHECKPOINT_LAB_MIRROR to the URL of one",
    )
}

/// The first whole Debian archive in lines of "release component URI".
fn choose_mirror(targets: &str) -> Option<String> {
    const SUITES: &[&str] = &[
        "bookworm",
        "trixie",
        "forky",
        "sid",
        "oldstable",
        "stable",
        "testing",
        "unstable",
    ];
    targets.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (suite, component, uri) = (words.next()?, words.next()?, words.next()?);
        (SUITES.contains(&suite) && component == "main").then(|| uri.to_owned())
    })
}

/// Runs a command whose output matters only when it fails.
pub(crate) fn run_quietly(command: &mut Command, what: &str) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {what}: {:?}", command.get_program()))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr]
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.concat();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(25)..].join("\n");
        bail!("{what} failed ({}); its last lines:\n{tail}", output.status);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_a_whole_archive_of_debian() {
        let targets = "bookworm-security main http://mirror.example/debian-security/\n\
                       cloud-sdk main http://vendor.example/apt/\n\
                       bookworm contrib http://mirror.example/debian/\n\
                       bookworm main http://mirror.example/debian/\n";
        assert_eq!(
            choose_mirror(targets).as_deref(),
            Some("http://mirror.example/debian/")
        );
        assert_eq!(
            choose_mirror("noble main http://mirror.example/ubuntu/"),
            None
        );
    }

    #[test]
    fn names_are_understood_both_ways() {
        for release in Release::ALL {
            assert_eq!(Release::from_name(release.name()), Some(release));
        }
        assert_eq!(Release::from_name("lenny"), None);
    }
}
