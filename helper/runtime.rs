//! The directory of programs that is bound into containers.
