#!/bin/sh
# Found before the real dmtcp_command. A checkpoint is asked for at container-checkpoint, which takes
# it, checks it and keeps it.
for word in "$@"; do
    case $word in
    -c | --checkpoint) exec "$CONTAINER_CHECKPOINT_CLIENT" save ;;
    -bc | --bcheckpoint) exec "$CONTAINER_CHECKPOINT_CLIENT" save --wait ;;
    esac
done
echo "container-checkpoint: error: dmtcp_command: only --checkpoint and --bcheckpoint are possible here" >&2
exit 1
