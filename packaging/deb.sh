#!/bin/sh
# Makes target/container-checkpoint_VERSION_ARCH.deb of the release build.
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
arch=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"
umask 022

sh packaging/install.sh "$root" /usr "/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null ||
    gcc -print-multiarch)/slurm"
install -d "$root/usr/share/doc/container-checkpoint/docs" "$root/DEBIAN"
install -m 0644 README.md CHANGELOG.md LICENSE "$root/usr/share/doc/container-checkpoint/"
install -m 0644 docs/*.md "$root/usr/share/doc/container-checkpoint/docs/"
# The helper was linked against this machine's C library and runs with that one or a newer one.
libc=$(dpkg-query -W -f '${Version}' libc6 | sed 's/-.*//')
cat > "$root/DEBIAN/control" <<CONTROL
Package: container-checkpoint
Version: $version
Architecture: $arch
Maintainer: The container-checkpoint authors <root@localhost>
Section: net
Priority: optional
Depends: libc6 (>= $libc), libgcc-s1
Recommends: apptainer
Suggests: criu, slurmd
Description: resumable containerized Slurm jobs
 A SPANK plugin and a helper that checkpoint containerized applications of Slurm
 jobs on pre-emption and at the time limit, with DMTCP or CRIU, requeue the job
 and let it go on where it was.
CONTROL
dpkg-deb --root-owner-group --build "$root" "target/container-checkpoint_${version}_$arch.deb"
