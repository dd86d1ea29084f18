#!/bin/sh
# Fuzzes every tests/fuzz/fuzz_*.c under the address and undefined-behaviour sanitizers: run.sh [SECONDS each].
# Seeds are in corpus/NAME; what is found is kept in $FUZZ_DIR (default: a temporary directory, named at the end).
# Exits with 1 on a finding.
set -eu

seconds=${1:-${SECONDS_EACH:-60}}
here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext
work=${FUZZ_DIR:-$(mktemp -d)}
failed=

for target in "$here"/fuzz_*.c; do
    name=$(basename "$target" .c)
    mkdir -p "$work/$name/new"
    clang -std=c11 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
        -fsanitize=fuzzer,address,undefined -I "$cext" "$target" "$cext"/*.c -pthread -o "$work/$name/fuzz"
    # A seed corpus of its own keeps the checkout clean: libFuzzer adds to the first directory only.
    seeds=
    [ ! -d "$here/corpus/$name" ] || seeds=$here/corpus/$name
    echo "== $name, $seconds s"
    # shellcheck disable=SC2086 # no seeds, no argument
    if ! "$work/$name/fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=16384 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$work/$name/" "$work/$name/new" $seeds \
        >"$work/$name/log" 2>&1; then
        failed="$failed $name"
        tail -60 "$work/$name/log"
    else
        grep -E 'number_of_executed_units|peak_rss_mb' "$work/$name/log"
    fi
done

if [ -n "$failed" ]; then
    echo "found something:$failed; inputs and logs are in $work" >&2
    exit 1
fi
[ -n "${FUZZ_DIR:-}" ] || rm -rf "$work"
