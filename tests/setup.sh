#!/bin/sh
# Installs what building and testing need on a Debian-like machine, if it is not there yet. As root.
# Quick when there is nothing to do.
set -eu

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

# Package, and a file or command that shows that it is there whoever installed it.
wanted='
gcc              cmd:gcc
libc6-dev        file:/usr/include/stdlib.h
make             cmd:make
pkg-config       cmd:pkg-config
libslurm-dev     file:/usr/include/slurm/spank.h
libclang-dev     glob:/usr/lib/llvm-*/lib/libclang*.so*
mmdebstrap       cmd:mmdebstrap
musl-tools       cmd:musl-gcc
debian-archive-keyring file:/usr/share/keyrings/debian-archive-keyring.gpg
util-linux       cmd:unshare
'

present() {
    case $1 in
    cmd:*) command -v "${1#cmd:}" >/dev/null 2>&1 ;;
    file:*) [ -e "${1#file:}" ] ;;
    glob:*) for path in ${1#glob:}; do [ -e "$path" ] && return 0; done; return 1 ;;
    esac
}

missing=$(echo "$wanted" | while read -r package sign; do
    [ -z "$package" ] || present "$sign" || printf '%s ' "$package"
done)

if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] || fail "run this as root: it has to install $missing"
    command -v apt-get >/dev/null 2>&1 || fail "this machine has no apt-get; install by hand what \
Debian calls: $missing"
    say "installing $missing"
    apt-get update -q >&2 || fail "apt-get update failed: is the machine's package mirror reachable?"
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing >&2 ||
        fail "apt-get install failed; needed are: $missing"
fi

# The standard library's file locks came with 1.89.
needed=89
command -v cargo >/dev/null 2>&1 || fail "there is no cargo: install Rust 1.$needed or newer, from \
your distribution (package rustup or cargo) or from the Rust project"
version=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
[ -n "$version" ] && [ "$version" -ge "$needed" ] || fail "Rust 1.$needed or newer is needed, and \
this is $(cargo --version)"
say "everything is there"
