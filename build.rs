//! Makes the plugin's bindings from Slurm's public header.
fn main() {}
