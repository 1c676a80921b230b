# The first process of a node: its own host name, processes, network and node-local directories on
# the cluster's root file system. Killing it is how a node is lost.
set -eu
# /proc is still the login host's.
read -r pid rest </proc/self/stat
echo "pid $pid $(readlink /proc/self/ns/pid)"
read -r go # the other end of the network cable is there

mount -t proc proc /proc
echo "$LAB_NODE" >/proc/sys/kernel/hostname
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/freezer
mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer
mount --bind "/nodes/$LAB_NODE/tmp" /tmp
mount --bind "/nodes/$LAB_NODE/var-tmp" /var/tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
ip addr add "$LAB_ADDRESS" dev eth0
ip link set eth0 up
slurmd
echo ready
exec env --ignore-signal=CHLD cat >/dev/null
