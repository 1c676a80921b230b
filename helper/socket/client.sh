#!/bin/sh
# For applications: ask the helper that keeps this application resumable. `client --help` says what
# can be asked. Runs in any image that has /bin/sh.
#
# The helper's own libraries come first, then those that DMTCP needs where it holds the application:
# this program is part of it, and has to be able to load what DMTCP preloads.
here=${0%/*}
path=$here/lib
for extra in "$here"/dmtcp/*/extra/*; do
    path=$path:$extra
done
exec "$here"/lib/@LOADER@ --inhibit-cache --library-path "$path" \
    "$here"/bin/container-checkpoint inside "$@"
