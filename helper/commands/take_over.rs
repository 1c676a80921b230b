//! `import-apptainer`: a checkpoint that Apptainer's own feature took becomes a generation.
//!
//! Contract: what is taken over was made by `apptainer instance start --dmtcp-launch NAME`, or by
//! DMTCP in any other way that leaves plain process images in a directory. Of what lies there the
//! newest complete set counts; every byte of it is walked through, copied and hashed before anything
//! is committed. The original is not changed. Nothing is taken over of something that runs: its
//! files may change at any moment, and two would go on from them.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::change::lock;
use super::output::{print, print_json};
use super::{Context, Failure, ImportApptainer};
use crate::container::image;
use crate::engine::{Kind, Placement, dmtcp};
use crate::store::{
    self, Durations, Error, Facts, ImageRecord, Name, Store, Trigger, bytes_for_people,
};
use crate::supervise;

/// Where Apptainer keeps checkpoints below its directory (`internal/pkg/checkpoint/dmtcp/manager.go`).
const CHECKPOINTS: &str = "checkpoint/dmtcp";

/// Where an instance sees that directory (`internal/pkg/checkpoint/dmtcp/config.go`).
const SEEN_AT: &str = "/.checkpoint";

/// Largest file of an instance that is read, in bytes.
const INSTANCE_MAX: u64 = 1 << 20;

#[derive(Serialize)]
struct Document {
    format: u32,
    name: String,
    generation: u64,
    from: String,
    bytes: u64,
}

pub fn take_over(import: &ImportApptainer, context: &Context<'_>) -> Result<(), Failure> {
    // Apptainer takes any path for a name: `../..` as well.
    let name = Name::parse(&import.name)?;
    let placement = match (&import.placement, &import.from) {
        (Some(placement), _) => *placement,
        (None, None) => Placement::Injected,
        (None, Some(_)) => Placement::Contained,
    };
    let (dir, seen_at) = match &import.from {
        Some(dir) => {
            let dir = std::path::absolute(dir).map_err(|error| unreadable(dir, &error))?;
            (dir.clone(), dir)
        }
        None => {
            let home = apptainers_directory()?;
            let dir = home.join(CHECKPOINTS).join(name.as_str());
            refuse_instances(&home, &name)?;
            (dir, SEEN_AT.into())
        }
    };
    if !dir.is_dir() {
        return Err(Error::Absent(format!(
            "checkpoint {name} of Apptainer: there is no directory {}",
            dir.display()
        ))
        .into());
    }
    refuse_running(&dir)?;
    let found = dmtcp::newest_set(&dir).map_err(|why| {
        Failure::Store(Error::Damaged {
            path: dir.clone(),
            why,
        })
    })?;

    let path = import
        .image
        .canonicalize()
        .map_err(|error| unreadable(&import.image, &error))?;
    let store = Store::open(context.store)?;
    let digest = image::digest(&path, &store.image_memory())
        .map_err(|error| Failure::Other(error.to_string()))?;
    let cell = store.name(&name);
    if !cell.numbers()?.is_empty() {
        return Err(Failure::Other(format!(
            "{name} has generations already, which go on as they are; delete it first, or import \
             {} under another name with --from",
            dir.display()
        )));
    }
    let lock = lock(&cell, context, false)?;
    let draft = lock.begin(found.bytes)?;
    let rank = draft.dir().join("rank-0");
    let copied = fs::DirBuilder::new()
        .mode(0o700)
        .create(&rank)
        .and_then(|()| dmtcp::bring(&found, &seen_at, &rank));
    copied.map_err(|error| Failure::Other(format!("cannot copy {}: {error}", dir.display())))?;
    dmtcp::check(&rank).map_err(|why| {
        Failure::Store(Error::Damaged {
            path: dir.clone(),
            why,
        })
    })?;
    let (kernel, cpu_flags) = supervise::node();
    let facts = Facts {
        trigger: Trigger::Request,
        predecessor: None,
        ranks: 1,
        engine: Kind::Dmtcp,
        engine_version: dmtcp::IMAGES_VERSION.into(),
        placement: Some(placement),
        kernel,
        cpu_flags,
        image: Some(ImageRecord {
            path: store::escape(path.as_os_str()),
            digest: digest.to_string(),
        }),
        command: vec![found.program.clone().into()],
        durations: Durations::default(),
        truncate: Vec::new(),
        needs: Vec::new(),
        listens: Vec::new(),
        streams: Vec::new(),
        computed: None,
    };
    let generation = draft.take_over(facts, &dir)?;
    let bytes = generation.manifest().bytes;
    if import.common.json {
        return print_json(&Document {
            format: 1,
            name: cell.label(),
            generation: generation.number(),
            from: dir.display().to_string(),
            bytes,
        });
    }
    print(&format!(
        "{}@{} came from {} ({})\n",
        cell.label(),
        generation.number(),
        dir.display(),
        bytes_for_people(bytes)
    ))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::Other(format!("cannot use {}: {error}", path.display()))
}

/// `$APPTAINER_CONFIGDIR`, or `.apptainer` in the user's home.
fn apptainers_directory() -> Result<PathBuf, Failure> {
    if let Some(dir) = std::env::var_os("APPTAINER_CONFIGDIR").filter(|dir| !dir.is_empty()) {
        return Ok(dir.into());
    }
    let uid = nix::unistd::getuid();
    match nix::unistd::User::from_uid(uid) {
        Ok(Some(user)) => Ok(user.dir.join(".apptainer")),
        _ => Err(Failure::Other(format!(
            "uid {uid} has no home directory; name Apptainer's with APPTAINER_CONFIGDIR"
        ))),
    }
}

/// What Apptainer writes about an instance, as far as it matters here.
#[derive(Deserialize)]
struct Instance {
    #[serde(default)]
    checkpoint: String,
}

/// Refuses a checkpoint that an instance uses, on whatever host: `instances/app/HOST/USER/NAME/` holds
/// a file about each that runs.
fn refuse_instances(home: &Path, name: &Name) -> Result<(), Failure> {
    let mut dirs = vec![home.join("instances/app")];
    for _ in 0..3 {
        let below = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        dirs = dirs.into_iter().flat_map(below).map(|e| e.path()).collect();
    }
    for dir in dirs {
        for file in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = file.path();
            let small = file.metadata().is_ok_and(|meta| meta.len() <= INSTANCE_MAX);
            if path.extension().is_none_or(|end| end != "json") || !small {
                continue;
            }
            let instance: Option<Instance> = fs::read(&path)
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok());
            if instance.is_some_and(|instance| instance.checkpoint == name.as_str()) {
                return Err(Failure::Store(Error::Refused(format!(
                    "checkpoint {name} of Apptainer is in use by the instance {}: stop that first \
                     (`apptainer instance stop`); if it has long ended, remove {}",
                    path.file_stem().unwrap_or_default().to_string_lossy(),
                    path.display()
                ))));
            }
        }
    }
    Ok(())
}

/// Refuses a checkpoint whose coordinator still has processes on this host.
fn refuse_running(dir: &Path) -> Result<(), Failure> {
    let port = fs::read_to_string(dir.join("coord.port")).unwrap_or_default();
    let Ok(port) = port.trim().parse() else {
        return Ok(());
    };
    match dmtcp::processes_at(port) {
        None | Some(0) => Ok(()),
        Some(count) => Err(Failure::Store(Error::Refused(format!(
            "{} is in use: {count} process(es) run under DMTCP's coordinator at port {port} of this \
             host; stop them first",
            dir.display()
        )))),
    }
}

/// For [`ImportApptainer::placement`].
pub fn placement(word: &str) -> Result<Placement, String> {
    match word {
        "injected" => Ok(Placement::Injected),
        "contained" => Ok(Placement::Contained),
        _ => Err("it is injected or contained".into()),
    }
}
