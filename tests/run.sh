#!/bin/sh
# Runs the unit tests, then the whole-system tests, two programs at a time; says last what failed
# and why, and what was skipped. Usage: run.sh [PROGRAM...]   (default: all)
#
# Each program is a test target of this workspace; most of them start clusters of their own. Those
# that tests/lab/Cargo.toml lists start in its order, so the long ones stand first there.
set -u
cd "$(dirname "$0")/.." || exit 1

out=${CARGO_TARGET_DIR:-target}/test-output
# Longer than any program takes on a slow machine; a program that hangs must not hang everything.
limit=1200
rm -rf "$out"
mkdir -p "$out"

# One program: its output and result go to files, one line goes to the screen.
cat > "$out/one.sh" <<'ONE'
name=$1 out=$2 limit=$3 started=$(date +%s)
case $name in
    unit) set -- --workspace --lib --bins ;;
    *) set -- --workspace --test "$name" ;;
esac
# --show-output: what a passing test says that it skipped is wanted, too. A pipe and no file: some
# write to /dev/stderr, which would empty the file.
{
    RUST_BACKTRACE=0 timeout -k 30 "$limit" cargo test -q --locked "$@" -- --show-output
    rc=$?
    [ $rc != 124 ] || echo "STOPPED: $name did not end within $limit s"
    echo "$rc" > "$out/$name.rc"
} 2>&1 < /dev/null | cat > "$out/$name.log"
word=ok
[ "$(cat "$out/$name.rc")" = 0 ] || word=FAILED
printf '%-6s %-16s %4d s\n' "$word" "$name" "$(($(date +%s) - started))"
ONE

# The names of all test targets, as cargo says when it has built them.
targets() {
    cargo test -q --locked --workspace --no-run --message-format json 2> /dev/null |
        sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"[^"]*".*/\1/p' | sort -u
}

echo "building"
if ! cargo build -q --locked --workspace || ! cargo test -q --locked --workspace --no-run; then
    echo "FAILED: the build"
    exit 1
fi
if [ $# -gt 0 ]; then
    programs=$*
else
    all=$(targets)
    listed=$(awk '/^\[/ { test = /^\[\[test\]\]/ } test && $1 == "name" { gsub(/"/, "", $3); print $3 }' \
        tests/lab/Cargo.toml)
    programs="unit $(printf '%s\n' "$listed" "$all" | awk 'NF && !seen[$0]++')"
fi
# shellcheck disable=SC2086 # a list of words
printf '%s\n' $programs > "$out/programs"
# Unit tests first and alone: where they fail, the rest is likely to.
grep -x unit "$out/programs" | xargs -r -I NAME sh "$out/one.sh" NAME "$out" "$limit"
grep -vx unit "$out/programs" | xargs -r -P 2 -I NAME sh "$out/one.sh" NAME "$out" "$limit"

failed=0
ran=0
for rc in "$out"/*.rc; do
    [ -e "$rc" ] || continue
    ran=$((ran + 1))
    [ "$(cat "$rc")" = 0 ] || failed=$((failed + 1))
done

if grep -qh '^SKIPPED' "$out"/*.log; then
    echo
    echo "skipped:"
    grep -h '^SKIPPED' "$out"/*.log | sed 's/^SKIPPED:* */  /' | sort | uniq -c
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
total=$(wc -l < "$out/programs")
if [ "$failed" != 0 ] || [ "$ran" != "$total" ]; then
    echo "$failed of $total test programs failed, $((total - ran)) did not run"
    exit 1
fi
echo "all $total test programs passed"
