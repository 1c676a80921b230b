#!/bin/sh
# usage: install.sh DESTDIR PREFIX PLUGINDIR
# Puts plugin, helper and what an admin copies below DESTDIR, with the final paths written in.
set -eu
cd "$(dirname "$0")/.."
dest=$1 prefix=$2 plugins=$3
share=$prefix/share/container-checkpoint
target=${CARGO_TARGET_DIR:-target}/release

install -D -m 0755 "$target/container-checkpoint" "$dest$prefix/bin/container-checkpoint"
install -D -m 0644 "$target/libcontainer_checkpoint.so" "$dest$plugins/container_checkpoint.so"
install -D -m 0644 slurm/container-checkpoint.yaml "$dest$share/container-checkpoint.yaml"
install -d "$dest$share/plugstack.conf.d" "$dest$share/examples"
sed "s|^\([a-z]* \)container_checkpoint\.so|\1$plugins/container_checkpoint.so helper=$prefix/bin/container-checkpoint|" \
    slurm/plugstack.conf.d/container-checkpoint.conf \
    > "$dest$share/plugstack.conf.d/container-checkpoint.conf"
chmod 0644 "$dest$share/plugstack.conf.d/container-checkpoint.conf"
install -m 0644 slurm/examples/* "$dest$share/examples/"
