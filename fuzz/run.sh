#!/usr/bin/env bash
# Runs all targets side by side, two processes each: run.sh SECONDS OUTDIR. Needs bash, awk, tar and xz; lies in a folder
# made by pack.sh. OUTDIR gets a log and the grown corpus of each target, the inputs of findings, and summary.txt.
set -euo pipefail
seconds=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)

work=$(mktemp -d "${TMPDIR:-/tmp}/peft-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/seeds"
tar -C "$work/bin" -xJf "$here/targets.tar.xz"
tar -C "$work/seeds" -xJf "$here/corpora.tar.xz"
# Rayon in a target would fight with the other processes.
export RAYON_NUM_THREADS=1

for target in $(ls "$work/bin"); do
    mkdir -p "$out/crashes/$target" "$out/corpus/$target" "$work/tmp-$target"
    options=(-fork=2 -ignore_crashes=1 -ignore_timeouts=1 -ignore_ooms=1 "-max_total_time=$seconds")
    options+=(-rss_limit_mb=2048 -timeout=10 "-artifact_prefix=$out/crashes/$target/")
    [ -e "$here/dictionaries/$target.dict" ] && options+=("-dict=$here/dictionaries/$target.dict")
    # Parquet files and templates are longer than what libFuzzer takes to be enough.
    [ "$target" = dataset_records ] && options+=(-max_len=16384)
    TMPDIR="$work/tmp-$target" "$work/bin/$target" "${options[@]}" "$out/corpus/$target" "$work/seeds/$target" \
        >"$out/$target.log" 2>&1 &
done
wait || true

{
    printf '%-20s %12s %8s %9s %9s %8s %6s %9s %8s\n' target executions exec/s coverage features corpus ooms timeouts crashes
    for target in $(ls "$work/bin"); do
        # The last line of the form "#N: cov: C ft: F corp: K exec/s: E oom/timeout/crash: A/B/C time: Ts job: …".
        awk -v target="$target" '
            /^#[0-9]+: cov:/ { runs = $1; gsub(/[#:]/, "", runs); cov = $3; ft = $5; corpus = $7
                for (i = 1; i <= NF; i++) { if ($i == "oom/timeout/crash:") bad = $(i + 1); if ($i == "time:") time = $(i + 1) } }
            END { sub(/s$/, "", time); split(bad, n, "/"); rate = time > 0 ? runs / time : 0
                printf "%-20s %12s %8.0f %9s %9s %8s %6s %9s %8s\n", target, runs, rate, cov, ft, corpus, n[1], n[2], n[3] }
        ' "$out/$target.log"
    done
} | tee "$out/summary.txt"
find "$out/crashes" -type f | sort | tee -a "$out/summary.txt"
