#!/bin/sh
# Runs the unit tests, then the whole-system tests, two programs at a time; says last what failed
# and why, and what was skipped. Usage: run.sh [PROGRAM...]   (default: all)
#
# Each whole-system program is a [[test]] of tests/lab/Cargo.toml and starts clusters of its own.
# They start in the order of that file, so the long ones stand first there.
set -u
cd "$(dirname "$0")/.." || exit 1

out=${CARGO_TARGET_DIR:-target}/test-output
# Longer than any program takes on a slow machine; a program that hangs must not hang everything.
limit=1200
programs=$(awk '/^\[\[test\]\]/ { test = 1; next } /^\[/ { test = 0 }
    test && $1 == "name" { gsub(/"/, "", $3); print $3 }' tests/lab/Cargo.toml)
if [ $# -gt 0 ]; then
    programs=$*
fi
rm -rf "$out"
mkdir -p "$out"

# One program: its output and result go to files, one line goes to the screen.
cat > "$out/one.sh" <<'ONE'
name=$1 out=$2 limit=$3 started=$(date +%s)
case $name in
    unit) set -- cargo test -q --locked --lib --bins -p container-checkpoint -p lab ;;
    *) set -- cargo test -q --locked -p lab --test "$name" ;;
esac
# --show-output: a passing test's SKIPPED lines are wanted, too.
timeout -k 30 "$limit" "$@" -- --show-output > "$out/$name.log" 2>&1
rc=$?
took=$(($(date +%s) - started))
[ $rc != 124 ] || echo "STOPPED: $name did not end within $limit s" >> "$out/$name.log"
echo "$rc" > "$out/$name.rc"
word=ok
[ $rc = 0 ] || word=FAILED
printf '%-6s %-16s %4d s\n' "$word" "$name" "$took"
ONE

echo "building"
if ! cargo build -q --locked --workspace || ! cargo test -q --locked --workspace --no-run; then
    echo "FAILED: the build"
    exit 1
fi
[ $# -gt 0 ] || sh "$out/one.sh" unit "$out" "$limit"
echo "$programs" | xargs -r -n 1 -P 2 sh -c 'sh "$1/one.sh" "$3" "$1" "$2"' - "$out" "$limit"

failed=0
ran=0
for rc in "$out"/*.rc; do
    [ -e "$rc" ] || continue
    ran=$((ran + 1))
    [ "$(cat "$rc")" = 0 ] || failed=$((failed + 1))
done

if grep -qh '^SKIPPED:' "$out"/*.log; then
    echo
    echo "skipped:"
    grep -h '^SKIPPED:' "$out"/*.log | sed 's/^SKIPPED:/ /' | sort | uniq -c
else
    echo
    echo "nothing was skipped"
fi
for rc in "$out"/*.rc; do
    [ -e "$rc" ] && [ "$(cat "$rc")" != 0 ] || continue
    name=$(basename "$rc" .rc)
    echo
    echo "==== $name (exit code $(cat "$rc")), all of it in $out/$name.log"
    # libtest: what each failed test said, and their names; else (crash, hang) the end.
    if grep -q '^failures:$' "$out/$name.log"; then
        awk '/^failures:$/ { on = 1 } on' "$out/$name.log" | tail -n 200
        grep '^STOPPED:' "$out/$name.log"
    else
        tail -n 60 "$out/$name.log"
    fi
done
echo
total=$(($(echo "$programs" | grep -c .) + ($# == 0)))
if [ "$failed" != 0 ] || [ "$ran" != "$total" ]; then
    echo "$failed of $total test programs failed, $((total - ran)) did not run"
    exit 1
fi
echo "all $total test programs passed"
