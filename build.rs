//! Makes the plugin's bindings from Slurm's public header `slurm/spank.h`, and keeps what the
//! plugin needs at run time down to libc.
//!
//! The header is looked for in `$SLURM_INCLUDE_DIR`, then where pkg-config's `slurm` says, then in
//! the compiler's default places. Whichever Slurm it comes from, 22.05 or newer, the plugin built
//! from it serves them all: what is used of the interface has not changed since.
//!
//! Also makes the library that the helper puts into processes under DMTCP
//! (`helper/engine/dmtcp/heap`).

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[path = "helper/engine/dmtcp/heap/build.rs"]
mod heap;

const HEADER: &str = "slurm/spank.h";

/// What the plugin uses, and nothing else.
const FUNCTIONS: &str = "spank_(context|get_item|getenv|option_getopt|option_register|setenv|strerror|unsetenv)\
|slurm_(error|info|verbose)";
const TYPES: &str = "spank_(item|context|option|t|err_t)";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("container-checkpoint: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SLURM_INCLUDE_DIR");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this by cargo")?);
    heap::library(&out)?;
    bindings(&header()?, &out.join("spank.rs"))?;
    static_libgcc(&out)
}

/// The path of `slurm/spank.h`.
fn header() -> Result<PathBuf, String> {
    if let Some(dir) = env::var_os("SLURM_INCLUDE_DIR") {
        let path = Path::new(&dir).join(HEADER);
        if path.is_file() {
            return Ok(path);
        }
        return Err(format!(
            "SLURM_INCLUDE_DIR has no {HEADER}: {} is missing",
            path.display()
        ));
    }
    let mut dirs = Vec::new();
    // Slurm's own `slurm.pc` names its include directory in Cflags, which pkg-config leaves out
    // where the compiler looks anyway.
    let mut slurm = pkg_config::Config::new();
    if let Ok(library) = slurm.cargo_metadata(false).probe("slurm") {
        dirs.extend(library.include_paths);
    }
    dirs.extend(["/usr/include", "/usr/local/include"].map(PathBuf::from));
    dirs.iter()
        .map(|dir| dir.join(HEADER))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let looked: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
            format!(
                "Slurm's header {HEADER} was not found in {}. Install it (Debian, Ubuntu: \
             `apt install libslurm-dev`; RHEL and its kin: `dnf install slurm-devel`), or set \
             SLURM_INCLUDE_DIR to the directory that has the directory slurm/",
                looked.join(", ")
            )
        })
}

fn bindings(header: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", header.display());
    let include = header
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("/"));
    let builder = bindgen::Builder::default()
        .header(header.display().to_string())
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_function(FUNCTIONS)
        .allowlist_type(TYPES)
        .allowlist_var("ESPANK_SUCCESS")
        // Plain integers: a newer Slurm may hand over a value that this header does not know.
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .layout_tests(false)
        .generate_comments(false);
    // bindgen panics, instead of failing, where it cannot load libclang.
    let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.generate()));
    let made = made.map_err(|_| {
        "bindgen could not load libclang (its reason is above). Install it (Debian, Ubuntu: \
         `apt install libclang-dev`; RHEL and its kin: `dnf install clang-devel`), or set \
         LIBCLANG_PATH to the directory that has libclang.so"
    })?;
    made.map_err(|error| format!("bindgen could not read {}: {error}", header.display()))?
        .write_to_file(to)
        .map_err(|error| format!("could not write {}: {error}", to.display()).into())
}

/// Links libgcc's unwinder into the plugin, so that libgcc_s.so is not needed where Slurm runs.
///
/// Rust's standard library asks for it by `-lgcc_s`, and neither `-static-libgcc` nor a switch of
/// rustc changes that. So the linker finds a script of this name first, which stands for libgcc's
/// static archives.
fn static_libgcc(out: &Path) -> Result<(), Box<dyn Error>> {
    let dir = out.join("lib");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("libgcc_s.so"), "INPUT(-lgcc_eh -lgcc)\n")?;
    println!("cargo::rustc-link-arg-cdylib=-L{}", dir.display());
    Ok(())
}
