//! Whether a generation can be restarted on this node.
//!
//! Contract: [`compare`] is a pure function of a manifest and of what this node is. A mismatch says
//! what differs and which nodes would do; whether a restart is tried all the same
//! (`restart=force`) is for others to decide.

use std::fmt;

use super::manifest::Manifest;
use crate::engine::Kind;

/// What a node is, as far as a restart depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    pub engine: Kind,
    pub engine_version: String,
    /// As `uname -r` prints it.
    pub kernel: String,
    /// See [`cpu_flags`].
    pub cpu_flags: Vec<String>,
    /// The digest of the container image of this run; none on the bare host.
    pub image: Option<String>,
}

/// Something that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// The field of the manifest: `engine`, `engine_version`, `kernel`, `cpu_flags`, `image`.
    pub field: &'static str,
    pub saved: String,
    pub present: String,
    /// What the user can do.
    pub hint: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.field {
            "engine" => "engine",
            "engine_version" => "version of the engine",
            "kernel" => "kernel",
            "cpu_flags" => "processor",
            _ => "container image",
        };
        write!(
            out,
            "the {what} differs: saved with {}, here is {}; {}",
            self.saved, self.present, self.hint
        )
    }
}

/// What makes a restart of `saved` on this node fail, or go wrong unseen.
pub fn compare(saved: &Manifest, present: &Present) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let mut differs = |field, saved: &str, present: &str, hint: String| {
        found.push(Mismatch {
            field,
            saved: saved.into(),
            present: present.into(),
            hint,
        });
    };
    let host = &saved.host;
    if saved.engine != present.engine {
        differs(
            "engine",
            &saved.engine.to_string(),
            &present.engine.to_string(),
            format!(
                "restart with --container-checkpoint-engine={}",
                saved.engine
            ),
        );
    } else if !compatible(saved.engine, &saved.engine_version, &present.engine_version) {
        differs(
            "engine_version",
            &saved.engine_version,
            &present.engine_version,
            match saved.engine {
                Kind::Dmtcp => "DMTCP restarts only what the same major version saved: ask for \
                     nodes that have it with --constraint"
                    .into(),
                Kind::Criu => "CRIU restarts only what the same or an older version saved: ask \
                     for nodes that have it with --constraint"
                    .into(),
            },
        );
    }
    // DMTCP puts the saved vDSO's addresses back, and they are those of one kernel build.
    if saved.engine == Kind::Dmtcp && saved.kernel != present.kernel {
        differs(
            "kernel",
            &saved.kernel,
            &present.kernel,
            format!("DMTCP needs the same kernel: ask for nodes like {host} with --constraint"),
        );
    }
    let missing: Vec<&str> = saved
        .cpu_flags
        .iter()
        .filter(|flag| !present.cpu_flags.contains(flag))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        differs(
            "cpu_flags",
            &missing.join(" "),
            "a processor without them",
            format!(
                "libraries have chosen their code by them: ask for nodes like {host} with \
                 --constraint"
            ),
        );
    }
    let image = saved.image.as_ref().map(|image| image.digest.as_str());
    if image != present.image.as_deref() {
        differs(
            "image",
            image.unwrap_or("none"),
            present.image.as_deref().unwrap_or("none"),
            match &saved.image {
                Some(image) => format!(
                    "put the image back that was {} then, or start fresh",
                    image.path
                ),
                None => "it was saved without a container: start it without, or start fresh".into(),
            },
        );
    }
    found
}

/// Whether what `saved` wrote restarts under `present`. DMTCP: the same major version (4.1.1 and
/// 4.2.0 were seen to restart each other's images, 3.x differs). CRIU: its images are compatible
/// forwards, within a major version as far as we rely on it.
fn compatible(engine: Kind, saved: &str, present: &str) -> bool {
    match (version(saved), version(present)) {
        (Some(saved), Some(present)) => {
            saved[0] == present[0] && (engine == Kind::Dmtcp || saved <= present)
        }
        // A version that is no number (a build from a repository) has to be the same.
        _ => saved == present,
    }
}

fn version(text: &str) -> Option<[u32; 3]> {
    let mut numbers = [0; 3];
    let plain = text.split(['-', '+', '~', ' ']).next()?;
    let mut parts = plain.split('.');
    for (at, number) in numbers.iter_mut().enumerate() {
        match parts.next() {
            Some(part) => *number = part.parse().ok()?,
            None if at > 0 => break,
            None => return None,
        }
    }
    Some(numbers)
}

/// Flags of /proc/cpuinfo by which libraries choose their code, sorted. `text` is that file. Those
/// that only concern the kernel, or come and go with its version and its mitigations, are left out.
pub fn cpu_flags(text: &str) -> Vec<String> {
    const PREFIXES: &[&str] = &[
        "sse",
        "ssse",
        "avx",
        "amx",
        "bmi",
        "sha",
        "xsave",
        "aes",
        "vaes",
        "gfni",
        "fma",
        "abm",
        "adx",
        "clflushopt",
        "clwb",
        "cx16",
        "erms",
        "f16c",
        "fsgsbase",
        "fsrm",
        "lahf",
        "lzcnt",
        "mmx",
        "movbe",
        "movdir",
        "pclmul",
        "popcnt",
        "prefetchw",
        "rdrand",
        "rdseed",
        "rdpid",
        "rdtscp",
        "rtm",
        "hle",
        "serialize",
        "vpclmul",
        "waitpkg",
        "3dnow",
        "xop",
        "tbm",
        "enqcmd",
        "cmpccxadd",
    ];
    // Arm's list has only what programs can use.
    let arm = |line: &&str| line.starts_with("Features");
    let x86 = |line: &&str| line.starts_with("flags");
    let mut flags: Vec<String> = Vec::new();
    if let Some(line) = text.lines().find(arm) {
        flags.extend(words_after_colon(line));
    } else if let Some(line) = text.lines().find(x86) {
        let known = |flag: &String| PREFIXES.iter().any(|prefix| flag.starts_with(prefix));
        flags.extend(words_after_colon(line).filter(known));
    }
    flags.sort();
    flags.dedup();
    flags
}

fn words_after_colon(line: &str) -> impl Iterator<Item = String> {
    line.split_once(':')
        .map_or("", |(_, words)| words)
        .split_whitespace()
        .map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::manifest::sample;

    fn same(saved: &Manifest) -> Present {
        Present {
            engine: saved.engine,
            engine_version: saved.engine_version.clone(),
            kernel: saved.kernel.clone(),
            cpu_flags: saved.cpu_flags.clone(),
            image: saved.image.as_ref().map(|image| image.digest.clone()),
        }
    }

    fn fields(saved: &Manifest, present: &Present) -> Vec<&'static str> {
        compare(saved, present).iter().map(|m| m.field).collect()
    }

    #[test]
    fn the_same_node_and_a_better_one() {
        let saved = sample();
        let mut present = same(&saved);
        assert_eq!(fields(&saved, &present), [""; 0]);
        present.cpu_flags.push("avx512f".into());
        present.engine_version = "4.2.0".into();
        assert_eq!(fields(&saved, &present), [""; 0]);
    }

    #[test]
    fn each_difference_is_named() {
        let mut saved = sample();
        let mut present = same(&saved);
        present.engine_version = "3.2.0".into();
        present.kernel = "6.1.0".into();
        present.cpu_flags = vec!["sse2".into()];
        present.image = None;
        assert_eq!(
            fields(&saved, &present),
            ["engine_version", "kernel", "cpu_flags", "image"]
        );
        let text = compare(&saved, &present)[2].to_string();
        assert!(
            text.contains("avx2") && text.contains("--constraint"),
            "{text}"
        );

        saved.engine = Kind::Criu;
        assert_eq!(fields(&saved, &present)[0], "engine");
        present.engine = Kind::Criu;
        assert_eq!(
            fields(&saved, &present),
            ["engine_version", "cpu_flags", "image"]
        );
    }

    #[test]
    fn versions() {
        for (engine, saved, present, fits) in [
            (Kind::Dmtcp, "4.2.0", "4.1.1", true),
            (Kind::Dmtcp, "3.2.0", "4.1.1", false),
            (Kind::Dmtcp, "4.1.1-rc2", "4.1.1", true),
            (Kind::Dmtcp, "main", "4.1.1", false),
            (Kind::Dmtcp, "main", "main", true),
            (Kind::Criu, "4.1.1", "4.2", true),
            (Kind::Criu, "4.2", "4.1.1", false),
        ] {
            assert_eq!(
                compatible(engine, saved, present),
                fits,
                "{engine} {saved} {present}"
            );
        }
    }

    #[test]
    fn flags_that_matter() {
        let intel = "processor\t: 0\nflags\t\t: fpu sse2 avx2 md_clear nopl avx\nbugs\t\t: x\n";
        assert_eq!(cpu_flags(intel), ["avx", "avx2", "sse2"]);
        assert_eq!(
            cpu_flags("Features\t: fp asimd sve\n"),
            ["asimd", "fp", "sve"]
        );
        assert_eq!(cpu_flags(""), [""; 0]);
        let here = cpu_flags(&std::fs::read_to_string("/proc/cpuinfo").unwrap());
        assert!(!here.is_empty());
    }
}
