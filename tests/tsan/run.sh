#!/bin/sh
# Runs the pump with its readers beside it under the thread sanitizer, then under the address and
# undefined-behaviour sanitizers, then under the latter alone, for with the others goes an allocator that aligns more
# than the C library's: run.sh [SECONDS each]. Exits with 1 on a finding.
set -eu

seconds=${1:-10}
here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=

for sanitizers in thread address,undefined undefined; do
    clang -std=c11 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
        -fsanitize="$sanitizers" -I "$cext" "$here/pump.c" "$cext"/*.c -pthread -o "$work/pump"
    echo "== pump, $sanitizers, $seconds s"
    TSAN_OPTIONS="halt_on_error=0 exitcode=66" timeout $((seconds * 3 + 60)) "$work/pump" "$seconds" || failed=yes
done
[ -z "$failed" ]
