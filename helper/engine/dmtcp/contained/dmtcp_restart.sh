#!/bin/sh
# Found before the real dmtcp_restart, and in place of DMTCP's restart script: goes on from what
# container-checkpoint has saved, if that is what it is to do.
work=/.container-checkpoint/work
if [ -f "$work/restart" ]; then
    read -r saved <"$work/saved"
    call=1
    while [ "$call" -le "$saved" ]; do
        mkdir -p "$work/launches/$call"
        call=$((call + 1))
    done
    case ${DMTCP_CHECKPOINT_INTERVAL-} in
    '' | *[!0-9]*) ;;
    *) echo "$DMTCP_CHECKPOINT_INTERVAL" >"$work/interval" ;;
    esac
    unset DMTCP_CHECKPOINT_INTERVAL
    . "$work/restart"
fi
echo "container-checkpoint: error: ${0##*/}: there is no saved state to go on from. A checkpoint that" \
    "DMTCP wrote without container-checkpoint is taken over by" \
    "\`container-checkpoint import-apptainer --from DIRECTORY NAME IMAGE\`" >&2
exit 99
