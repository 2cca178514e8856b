#!/usr/bin/env bash
# prepare_instance.sh v1 CATEGORY ONNX VNNLIB
#
# Ends what an earlier run_instance.sh may have left behind, and checks that the files exist. A non-zero exit tells
# the harness to leave the category out: a file is missing, or the instance has several networks.
set -euo pipefail

if [ "${1:-}" != v1 ]; then
    echo "prepare_instance.sh: expected 'v1' as the first argument, got '${1:-}'" >&2
    exit 1
fi
if [ $# -ne 4 ]; then
    echo "usage: prepare_instance.sh v1 CATEGORY ONNX VNNLIB" >&2
    exit 1
fi
onnx=$3
vnnlib=$4

# The file holds a process id and its start time, so that a number in use again by another program is left alone.
running="${TMPDIR:-/tmp}/qverify-vnncomp-$(id -u)/running"
if [ -O "$running" ] && read -r pid started <"$running" && [ -r "/proc/$pid/stat" ]; then
    if [ "$(sed 's/.*) //' "/proc/$pid/stat" | cut -d ' ' -f 20)" = "$started" ]; then
        echo "prepare_instance.sh: ending qverify process $pid of an earlier instance" >&2
        kill -KILL "$pid" 2>/dev/null || true
    fi
fi
rm -f -- "$running"

case $onnx in
\[*)
    echo "prepare_instance.sh: properties of several networks are not supported: $onnx" >&2
    exit 1
    ;;
esac
for file in "$onnx" "$vnnlib"; do
    if [ ! -f "$file" ] && [ ! -f "$file.gz" ]; then
        echo "prepare_instance.sh: no such file: $file" >&2
        exit 1
    fi
done
