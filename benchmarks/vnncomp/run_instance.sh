#!/usr/bin/env bash
# run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT
#
# Writes the verdict and any counterexample to RESULTS_FILE and exits with 0; without a verdict (an unsupported
# network, say) there is no file and the exit code is not 0. qverify stops by itself a little before TIMEOUT.
# QVERIFY_BIN names another executable than the one that install_tool.sh installed.
set -euo pipefail

if [ "${1:-}" != v1 ]; then
    echo "run_instance.sh: expected 'v1' as the first argument, got '${1:-}'" >&2
    exit 1
fi
if [ $# -ne 6 ]; then
    echo "usage: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT" >&2
    exit 1
fi
onnx=$3
vnnlib=$4
results=$5
timeout=$6

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
qverify=${QVERIFY_BIN:-${QVERIFY_VENV:-$repo/.venv-vnncomp}/bin/qverify}
if ! command -v -- "$qverify" >/dev/null; then
    echo "run_instance.sh: no executable $qverify; run install_tool.sh v1 first, or name one in QVERIFY_BIN" >&2
    exit 1
fi

# The margin lets a verdict be written in time: 2 % of the limit, at least one second, at most half of the limit.
limit=$(LC_ALL=C awk -v t="$timeout" 'BEGIN {
    if (t !~ /^[0-9]*[.]?[0-9]+$/ && t !~ /^[0-9]+[.]$/ || t + 0 <= 0) exit 1
    margin = t * 0.02
    if (margin < 1) margin = 1
    if (margin > t / 2) margin = t / 2
    printf "%.3f\n", t - margin
}') || {
    echo "run_instance.sh: the timeout '$timeout' is not a positive number of seconds" >&2
    exit 1
}

rm -f -- "$results" # a verdict left by an earlier run must not be taken for this one's
case $onnx in
\[*)
    echo "run_instance.sh: properties of several networks are not supported: $onnx" >&2
    echo unknown >"$results"
    exit 0
    ;;
esac

# prepare_instance.sh reads this; a directory of our own, since others may write to /tmp.
state="${TMPDIR:-/tmp}/qverify-vnncomp-$(id -u)"
mkdir -p -m 700 -- "$state" 2>/dev/null || true
if [ -O "$state" ] && [ -r "/proc/$$/stat" ]; then
    echo "$$ $(sed 's/.*) //' "/proc/$$/stat" | cut -d ' ' -f 20)" >"$state/running" || true
fi

# exec: the process that the harness started, and kills, is qverify itself, and it starts no others. That holds for
# every way of killing, where a trap in this script would not run on SIGKILL.
exec "$qverify" "$onnx" "$vnnlib" "$results" --timeout "$limit" --exit-zero
