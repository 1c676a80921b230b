//! This machine's DMTCP, which goes into the clusters as an administrator would install it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Entry};

/// The prefix of the DMTCP on this machine's PATH, e.g. `/usr/local`.
pub fn dmtcp() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let launch = std::env::split_paths(&path)
        .map(|directory| directory.join("dmtcp_launch"))
        .find(|candidate| candidate.is_file())?;
    Some(launch.canonicalize().ok()?.parent()?.parent()?.to_owned())
}

/// Like [`dmtcp`], for tests that cannot do without: where there is none, says loudly that `test`
/// was skipped, or fails if `CONTAINER_CHECKPOINT_REQUIRE_DMTCP=1`.
pub fn require_dmtcp(test: &str) -> Result<Option<PathBuf>> {
    let found = dmtcp();
    if found.is_none() {
        if std::env::var_os("CONTAINER_CHECKPOINT_REQUIRE_DMTCP").is_some_and(|value| value == "1")
        {
            bail!("{test} needs DMTCP: there is no dmtcp_launch on PATH");
        }
        // Past the test harness's capture: a skipped test has to be seen. Appending, because standard
        // error may be a file that others write to.
        let text = format!("SKIPPED {test}: there is no dmtcp_launch on PATH\n");
        let past = fs::File::options().append(true).open("/dev/stderr");
        if past
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .is_err()
        {
            eprint!("{text}");
        }
    }
    Ok(found)
}

/// A layer for a root file system with the DMTCP installed in `prefix`, under the same prefix.
pub(crate) fn layer(prefix: &Path) -> Result<Entry> {
    let files = files(prefix)?;
    let mut recipe = String::new();
    for file in &files {
        let data = file
            .metadata()
            .with_context(|| format!("cannot read {}", file.display()))?;
        recipe += &format!(
            "{} {} {}.{}\n",
            file.display(),
            data.len(),
            data.mtime(),
            data.mtime_nsec()
        );
    }
    cache::entry("dmtcp", &recipe, |path| {
        for file in &files {
            let copy = path.join(file.strip_prefix("/").unwrap_or(file));
            let directory = copy.parent().unwrap_or(path);
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
            fs::copy(file, &copy).with_context(|| format!("cannot copy {}", file.display()))?;
        }
        Ok(())
    })
}

/// DMTCP's programs and libraries in `prefix`, sorted.
fn files(prefix: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for (directory, ours) in [
        ("bin", &["dmtcp_", "mtcp_restart"][..]),
        ("lib/dmtcp", &["lib"][..]),
        ("lib64/dmtcp", &["lib"][..]),
    ] {
        let directory = prefix.join(directory);
        if !directory.exists() {
            continue;
        }
        let entries = fs::read_dir(&directory)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", directory.display()))?;
            let name = entry.file_name();
            if ours
                .iter()
                .any(|start| name.to_string_lossy().starts_with(start))
            {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}
