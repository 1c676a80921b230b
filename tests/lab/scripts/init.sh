# The first process of a cluster: puts the file system together, starts munge and slurmctld as soon
# as it is told to, and then waits for the end of standard input. When it ends, the kernel ends
# everything else in its PID namespace.
set -eu
# /proc is still the host's: this is the process id that the host knows.
read -r pid rest </proc/self/stat
echo "pid $pid"

root=$LAB_DIR/root
mount -t overlay -o "lowerdir=$LAB_LOWER,upperdir=$LAB_DIR/upper,workdir=$LAB_DIR/work,volatile" \
    lab "$root"
# Plain directories for all that jobs open: CRIU cannot save files on an overlay.
for directory in home tmp var/tmp nodes; do
    mkdir -p "$root/$directory"
    mount --bind "$LAB_DIR/plain/$directory" "$root/$directory"
done
if [ -n "$LAB_IMAGES" ]; then
    mkdir -p "$root/images"
    mount --bind "$LAB_IMAGES" "$root/images"
    mount -o remount,bind,ro "$root/images"
fi
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
    numbers=${device#*:}
    mknod -m 666 "$root/dev/${device%%:*}" c "${numbers%:*}" "${numbers#*:}"
done
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for stream in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${stream%:*}" "$root/dev/${stream#*:}"
done
cd "$root"
pivot_root . .
umount -l .
cd /
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

echo login >/proc/sys/kernel/hostname
ip link set lo up
# A fixed address: by itself a bridge takes that of one of its ports, and when that node is stopped,
# the others go on sending to the old one.
ip link add bridge address 02:00:00:00:00:01 type bridge
ip addr add "$LAB_LOGIN_ADDRESS" dev bridge
ip link set bridge up

install -d -o munge -g munge -m 755 /run/munge
install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge /etc/munge
(umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key)
chown munge:munge /etc/munge/munge.key
setpriv --reuid=munge --regid=munge --clear-groups munged
slurmctld
echo ready
# While SIGCHLD is ignored the kernel itself reaps orphans. (dash cannot ignore it with trap.)
exec env --ignore-signal=CHLD cat >/dev/null
