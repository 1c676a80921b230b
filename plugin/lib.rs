//! The SPANK plugin.
#[allow(dead_code)]
mod words;
