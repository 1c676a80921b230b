//! The criu engine.
