//! The SPANK plugin: options for `sbatch`, `srun` and `salloc`, and the helper in front of the
//! tasks that asked for it.
//!
//! Contract: it is loaded into Slurm's own processes, so it reads no file, waits for nothing, starts
//! nothing and needs nothing but libc; only in the commands that users wait for it may start the
//! helper, for some seconds, where the administrator wants that (`preflight`). A panic ends in the
//! callback it happened in. A job that did not ask never notices: whatever fails is told only to
//! those who gave the option, at submission where possible and else instead of starting their task.
//! One build serves Slurm 22.05 to 26.05.
//!
//! This file is what Slurm sees: the exported symbols, and nothing else is exported. `submit` and
//! `task` are what happens at the two ends; `spank` is Slurm seen from here.

mod multi_prog;
mod options;
mod settings;
mod words;

#[cfg(not(test))]
mod exports;
#[cfg(not(test))]
mod preflight;
#[cfg(not(test))]
mod spank;
#[cfg(not(test))]
mod state;
#[cfg(not(test))]
mod submit;
#[cfg(not(test))]
mod task;
