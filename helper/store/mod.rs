//! Generations, manifests, the lock.
