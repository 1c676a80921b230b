# Holds a cluster and cleans up after it, whatever becomes of the process that started it: the
# cluster's first process ends when standard input does. Runs on the host, in a mount namespace of
# its own, under `flock`.
set -u
# A mount of its own: where the host uses control groups v2 only, the v1 freezer, which Slurm's
# proctrack/cgroup needs least of, is not mounted, but free to be.
freezer=$LAB_DIR/freezer
mkdir "$freezer"
if mount -t cgroup -o freezer cgroup "$freezer"; then
    parent=$freezer$LAB_FREEZER
    # What clusters have left whose scripts were killed.
    for old in "$parent"/lab-*/; do
        name=${old%/}
        [ ! -d "$old" ] || [ -d "${LAB_DIR%/*}/${name##*/}" ] || find "$old" -depth -type d -delete
    done
    group=$parent/${LAB_DIR##*/}
    mkdir "$group"
    for host in login $LAB_NODES; do mkdir "$group/$host"; done
    # The shell in front of unshare moves into the group first, so that the new control group
    # namespace has that group as its root.
    LAB_GROUP=$group/login sh -c 'echo $$ >"$LAB_GROUP/cgroup.procs" && exec unshare --mount --uts \
        --ipc --net --pid --cgroup --fork --kill-child=KILL --propagation private -- \
        /bin/sh -c "$LAB_INIT" lab-init'
    status=$?
    for try in 1 2 3 4 5 6 7 8 9 10; do
        find "$group" -depth -type d -delete 2>/dev/null
        [ -d "$group" ] || break
        sleep 0.1 # the kernel lets go of a group a moment after its last process
    done
    umount -l "$freezer"
else
    echo "cannot mount the v1 hierarchy 'freezer' of control groups, which the cluster's nodes use" >&2
    status=1
fi
rm -rf --one-file-system "$LAB_DIR" "$LAB_DIR.lock"
exit $status
