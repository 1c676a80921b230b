#!/bin/sh
# Found before the real dmtcp_launch by scripts that start their program under DMTCP themselves.
# container-checkpoint has a coordinator and a directory for it, saves it and, when the script runs
# again, restarts it here. What it needs is in its working directory: see contained.rs.
work=/.container-checkpoint/work

refuse() {
    echo "container-checkpoint: error: dmtcp_launch: $1" >&2
    exit 99
}

wish=${DMTCP_CHECKPOINT_INTERVAL-}
unset DMTCP_CHECKPOINT_INTERVAL
flags='' plugin='' signal='' port_file=''
while [ $# -gt 0 ]; do
    case $1 in
    -i | --interval) wish=${2-} ;;
    --port-file) port_file=${2-} ;;
    --with-plugin) plugin=${2-} ;;
    --ckpt-signal) signal=${2-} ;;
    -h | --coord-host | --host | -p | --coord-port | --port | --coord-logfile) ;;
    -c | --ckptdir | -t | --tmpdir) ;;
    -*) false ;;
    *) break ;;
    esac && {
        # An option with a value.
        [ $# -gt 1 ] || refuse "$1 needs a value"
        shift 2
        continue
    }
    case $1 in
    -i[0-9]*) wish=${1#-i} ;;
    -p[0-9]* | -j | --join | --join-coordinator | --new-coordinator | --any-coordinator) ;;
    # container-checkpoint wants plain images, and looks after open files itself.
    --gzip | --no-gzip | --ckpt-open-files | --checkpoint-open-files | --allow-file-overwrite) ;;
    -q | --quiet) ;;
    --)
        shift
        break
        ;;
    *) flags="$flags $1" ;;
    esac
    shift
done

case $wish in
'' | *[!0-9]*) ;;
*) echo "$wish" >"$work/interval" ;;
esac

# Under DMTCP already, with the shell that has called this.
if [ -n "${CONTAINER_CHECKPOINT_HELD-}" ]; then
    [ $# -gt 0 ] || refuse "a command is needed"
    unset CONTAINER_CHECKPOINT_HELD
    exec "$@"
fi

if [ $# -gt 0 ]; then
    call=1
    until mkdir "$work/launches/$call" 2>/dev/null; do
        [ -d "$work/launches/$call" ] || refuse "cannot write into $work"
        call=$((call + 1))
    done
    if [ -f "$work/restart" ]; then
        read -r saved <"$work/saved"
        if [ "$call" -lt "$saved" ]; then
            echo "container-checkpoint: $1 had ended when this was saved, it is not run again" >&2
            exit 0
        elif [ "$call" -eq "$saved" ]; then
            . "$work/restart"
        fi
    fi
fi
# shellcheck disable=SC2086 # flags are words of DMTCP's own
set -- $flags ${plugin:+--with-plugin "$plugin"} ${signal:+--ckpt-signal "$signal"} \
    ${port_file:+--port-file "$port_file"} "$@"
. "$work/launch"
