//! Makes what the helper's modules include.

use std::env;
use std::error::Error;
use std::path::Path;

#[path = "../helper/engine/dmtcp/heap/build.rs"]
mod heap;

fn main() -> Result<(), Box<dyn Error>> {
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this by cargo")?;
    heap::library(Path::new(&out))
}
