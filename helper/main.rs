//! `container-checkpoint`: the helper that stands in place of a task, and the command for people.
#[path = "../plugin/words.rs"]
mod words;

mod config;
mod container;
mod engine;
mod runtime;
mod slurm;
mod store;

fn main() {}
