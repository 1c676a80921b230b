#!/bin/sh
# Found before the real dmtcp_coordinator: there is one already.
work=/.container-checkpoint/work
while [ $# -gt 0 ]; do
    [ "$1" = --port-file ] && cat "$work/port" >"${2-/dev/null}"
    shift
done
