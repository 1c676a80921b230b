//! What the job is, when it ends, requeue.
