//! Who else writes to a file.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use crate::engine::criu::files::writes;

/// Processes of this user on this node that have `file` open for writing as well, but for `known`
/// ones, for people. What stands between Slurm and this process (see [`crate::front`]) only holds it.
pub fn others(file: &File, known: &[u32]) -> Vec<String> {
    let Ok(own) = file.metadata() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = process.file_name().to_string_lossy().parse::<u32>();
        let Ok(number) = number else { continue };
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        if number == std::process::id()
            || known.contains(&number)
            || name.starts_with(crate::front::NAMES)
        {
            continue;
        }
        let open = fs::read_dir(process.path().join("fd"));
        let writer = open.into_iter().flatten().flatten().any(|entry| {
            let info = process.path().join("fdinfo").join(entry.file_name());
            fs::metadata(entry.path())
                .is_ok_and(|meta| (meta.dev(), meta.ino()) == (own.dev(), own.ino()))
                && fs::read_to_string(info).is_ok_and(|info| writes(&info))
        });
        if writer {
            found.push(format!("{} (process {number})", name.trim_end()));
        }
    }
    found
}
