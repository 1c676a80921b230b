//! Makes the library of this directory; for build scripts.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes `heap.so` in `out`, of `library.rs`.
pub fn library(out: &Path) -> Result<(), Box<dyn Error>> {
    let known =
        |name: &str| env::var_os(name).ok_or(format!("{name} is not set: run this by cargo"));
    let mut rustc = Command::new(known("RUSTC")?);
    rustc
        .args(["--edition=2024", "--crate-name=heap", "--crate-type=cdylib"])
        .args(["-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"])
        .args(["-Clink-arg=-nostartfiles", "-Clink-arg=-nodefaultlibs"])
        .arg("--target")
        .arg(known("TARGET")?)
        .arg("-o")
        .arg(out.join("heap.so"))
        .arg("-")
        .stdin(Stdio::piped());
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = OsString::from("-Clinker=");
        option.push(linker);
        rustc.arg(option);
    }
    let mut rustc = rustc.spawn()?;
    if let Some(mut source) = rustc.stdin.take() {
        source.write_all(include_bytes!("library.rs"))?;
    }
    match rustc.wait()?.success() {
        true => Ok(()),
        false => Err("cannot make the library heap.so".into()),
    }
}
