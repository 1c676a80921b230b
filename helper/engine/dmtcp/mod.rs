//! The dmtcp engine.
