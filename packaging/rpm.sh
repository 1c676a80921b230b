#!/bin/sh
# Makes target/rpm/ARCH/container-checkpoint-VERSION.rpm of the release build.
set -eu
cd "$(dirname "$0")/.."
command -v rpmbuild > /dev/null || {
    echo "rpm.sh: rpmbuild is missing: install rpm-build (RHEL) or rpm (Debian)" >&2
    exit 1
}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 0755 "$root"
umask 022

sh packaging/install.sh "$root" /usr /usr/lib64/slurm
install -d "$root/usr/share/doc/container-checkpoint/docs"
install -m 0644 README.md CHANGELOG.md LICENSE "$root/usr/share/doc/container-checkpoint/"
install -m 0644 docs/*.md "$root/usr/share/doc/container-checkpoint/docs/"
rpmbuild -bb --quiet --define "_topdir $PWD/target/rpmbuild" --define "_rpmdir $PWD/target/rpm" \
    --define "version $version" --define "staged $root" --define "debug_package %{nil}" \
    packaging/container-checkpoint.spec
find target/rpm -name "*.rpm"
