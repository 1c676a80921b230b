//! `export` and `import`: a generation as one file.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::output::{Progress, print, print_json};
use super::{Context, Export, Failure, Import, Target, entry, readable, store_with};
use crate::store::{
    self, Cell, Error, Generation, Holder, Manifest, Name, StepKey, Store, bytes_for_people,
};

#[derive(Serialize)]
struct Document {
    format: u32,
    name: String,
    generation: u64,
    file: String,
    bytes: u64,
    /// The size of the archive, where it is known.
    archive_bytes: Option<u64>,
}

pub fn export(export: &Export, context: &Context<'_>) -> Result<(), Failure> {
    let target = Target::parse(&export.name)?;
    let cell = target.cell(&store_with(context, &export.name)?)?;
    let entry = entry(&cell, target.generation)?;
    let generation = readable(&cell, entry)?;
    let label = format!("{}@{}", cell.label(), generation.number());
    let progress = Progress::new(&format!("exporting {label}"), generation.manifest().bytes);

    if export.file == Path::new("-") {
        if io::stdout().is_terminal() {
            return Err(Failure::Usage(
                "an archive is nothing to show on a terminal: name a file, or send it on with |"
                    .into(),
            ));
        }
        generation.export(io::stdout().lock(), &|bytes| progress.add(bytes))?;
        return Ok(());
    }
    let size = export_file(&generation, &export.file, export.force, &progress)?;
    drop(progress);
    if export.common.json {
        return print_json(&Document {
            format: 1,
            name: cell.label(),
            generation: generation.number(),
            file: export.file.display().to_string(),
            bytes: generation.manifest().bytes,
            archive_bytes: Some(size),
        });
    }
    print(&format!(
        "{label} is in {} ({} for {})\n",
        export.file.display(),
        bytes_for_people(size),
        bytes_for_people(generation.manifest().bytes)
    ))
}

/// Writes the archive under another name first: there is never half of one under its own.
fn export_file(
    generation: &Generation,
    path: &Path,
    force: bool,
    progress: &Progress,
) -> Result<u64, Failure> {
    let failed = |doing: &str, error: io::Error| {
        Failure::Other(format!("could not {doing} {}: {error}", path.display()))
    };
    if path.exists() && !force {
        return Err(Failure::Other(format!(
            "{} exists already: choose another name, or replace it with --force",
            path.display()
        )));
    }
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(|error| failed("create", error))?;
    generation.export(io::BufWriter::new(&mut file), &|bytes| progress.add(bytes))?;
    file.as_file()
        .sync_all()
        .map_err(|error| failed("sync", error))?;
    let size = file
        .as_file()
        .metadata()
        .map_err(|error| failed("look at", error))?
        .len();
    if force {
        file.persist(path)
            .map_err(|error| failed("write", error.error))?;
    } else {
        file.persist_noclobber(path)
            .map_err(|error| failed("write", error.error))?;
    }
    Ok(size)
}

pub fn import(import: &Import, context: &Context<'_>) -> Result<(), Failure> {
    let stdin = import.file == Path::new("-");
    let input: Box<dyn Read> = if stdin {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(&import.file).map_err(|error| {
            Failure::Other(format!("could not open {}: {error}", import.file.display()))
        })?)
    };
    let from = if stdin {
        Path::new("standard input")
    } else {
        import.file.as_path()
    };
    let wanted = import.name.as_deref().map(Target::parse).transpose()?;
    if wanted
        .as_ref()
        .is_some_and(|target| target.generation.is_some())
    {
        return Err(Failure::Usage(
            "the number of an imported generation is not to choose".into(),
        ));
    }
    let store = Store::open(context.store)?;
    let me = Holder::this_process(None, "command", 0)?;
    let progress = Progress::new("importing", 0);
    let imported = std::cell::OnceCell::new();
    let choose = |manifest: &Manifest| {
        let cell = destination(&store, wanted.as_ref(), manifest)?;
        let taken = || {
            Error::Refused(format!(
                "{} has generations already: import under another name with --name",
                cell.label()
            ))
        };
        if !cell.numbers()?.is_empty() {
            return Err(taken());
        }
        let lock = cell.lock(&me, context.witness, false, Duration::ZERO)?;
        // Another import may have been faster.
        if !cell.numbers()?.is_empty() {
            return Err(taken());
        }
        progress.set_label(&format!("importing {}", cell.label()));
        progress.set_total(manifest.bytes);
        Ok(imported.get_or_init(|| lock).clone())
    };
    let input = io::BufReader::with_capacity(1 << 20, input);
    let add = |bytes| progress.add(bytes);
    let generation = store::import(input, from, &choose, context.verify, &add)?;
    drop(progress);
    let name = imported
        .get()
        .map(|lock| lock.cell().label())
        .unwrap_or_default();
    super::warn_of_paths(generation.manifest(), &name);
    if import.common.json {
        return print_json(&Document {
            format: 1,
            name,
            generation: generation.number(),
            file: from.display().to_string(),
            bytes: generation.manifest().bytes,
            archive_bytes: None,
        });
    }
    print(&format!(
        "{name}@{} came from {} ({})\n",
        generation.number(),
        from.display(),
        bytes_for_people(generation.manifest().bytes)
    ))
}

/// The cell that was asked for, or the one of the name that the generation was saved under.
fn destination(store: &Store, wanted: Option<&Target>, manifest: &Manifest) -> Result<Cell, Error> {
    let (name, key) = match wanted {
        Some(target) => (target.name.clone(), target.key.clone()),
        None => (
            Name::parse(&manifest.name)?,
            manifest
                .step_key
                .as_deref()
                .map(StepKey::parse)
                .transpose()?,
        ),
    };
    let cell = store.name(&name);
    Ok(match key {
        Some(key) => cell.step(&key),
        None => cell,
    })
}
