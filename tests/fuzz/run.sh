#!/bin/sh
# Fuzzes every tests/fuzz/fuzz_*.c under the address and undefined-behaviour sanitizers, one on each core: run.sh [SECONDS each].
# And every tests/fuzz/fuzz_*.py, by the Python of .venv.
# What they fuzz is compiled once. Seeds are in corpus/NAME; what is found is kept in $FUZZ_DIR (default: a temporary
# directory, named at the end).
# Exits with 1 on a finding.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cext=$here/../../cext

compile() { # FILE.c DIRECTORY
    clang -std=c11 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
        -fsanitize=fuzzer-no-link,address,undefined -I "$cext" -c "$1" -o "$2/objects/$(basename "$1" .c).o"
}

fuzz() { # TARGET.c SECONDS DIRECTORY
    name=$(basename "$1" .c)
    mkdir -p "$3/$name/new"
    clang -std=c11 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all \
        -fsanitize=fuzzer,address,undefined -I "$cext" "$1" "$3"/objects/*.o -pthread -o "$3/$name/fuzz"
    # A seed corpus of its own keeps the checkout clean: libFuzzer adds to the first directory only.
    seeds=
    [ ! -d "$here/corpus/$name" ] || seeds=$here/corpus/$name
    # shellcheck disable=SC2086 # no seeds, no argument
    if "$3/$name/fuzz" -max_total_time="$2" -timeout=10 -rss_limit_mb=1024 -max_len=16384 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$3/$name/" "$3/$name/new" $seeds >"$3/$name/log" 2>&1; then
        echo "$name, $2 s: $(grep -E 'number_of_executed_units|peak_rss_mb' "$3/$name/log" | tr -s '\n ' ' ')"
    else
        tail -60 "$3/$name/log"
        echo "$name: found something" >&2
        exit 1
    fi
}

fuzz_python() { # TARGET.py SECONDS
    cd "$here/../.."
    .venv/bin/python -m "tests.fuzz.$(basename "$1" .py)" "$2"
}

case ${1:-} in
--compile) shift; compile "$@"; exit ;;
--one)
    shift
    case $1 in *.py) fuzz_python "$@" ;; *) fuzz "$@" ;; esac
    exit
    ;;
esac

seconds=${1:-60}
work=${FUZZ_DIR:-$(mktemp -d)}
mkdir -p "$work/objects"
printf '%s\n' "$cext"/*.c | xargs -P "$(nproc)" -I '{}' "$0" --compile '{}' "$work"
if ! printf '%s\n' "$here"/fuzz_*.c "$here"/fuzz_*.py | xargs -P "$(nproc)" -I '{}' "$0" --one '{}' "$seconds" "$work"; then
    echo "inputs and logs are in $work" >&2
    exit 1
fi
[ -n "${FUZZ_DIR:-}" ] || rm -rf "$work"
