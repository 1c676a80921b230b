# Holds a cluster and cleans up after it, whatever becomes of the process that started it: the
# cluster's first process ends when standard input does. Runs on the host, under `flock`.
set -u
# The shell in front of unshare moves into the cluster's control group first, so that the new
# control group namespace has that group as its root.
sh -c 'for group in $LAB_CGROUPS; do echo $$ >"$group/login/cgroup.procs" || exit 1; done
exec unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child=KILL \
    --propagation private -- /bin/sh -c "$LAB_INIT" lab-init'
status=$?
for group in $LAB_CGROUPS; do
    for try in 1 2 3 4 5 6 7 8 9 10; do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
        [ -d "$group" ] || break
        sleep 0.1 # the kernel lets go of a group a moment after its last process
    done
done
rm -rf --one-file-system "$LAB_DIR" "$LAB_DIR.lock"
exit $status
