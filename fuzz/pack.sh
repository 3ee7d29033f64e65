#!/usr/bin/env bash
# Makes FOLDER, which runs all targets on a machine without Rust: pack.sh FOLDER. FUZZ_TARGET_DIR is where to build, by
# default fuzz/target.
set -euo pipefail
out=$1
cd "$(dirname "$0")"
target_dir=${FUZZ_TARGET_DIR:-$PWD/target}
triple=$(rustc -vV | sed -n 's/^host: //p')
RUSTC_BOOTSTRAP=1 cargo fuzz build -s none --codegen-units 16 --fuzz-dir . --target-dir "$target_dir"

mkdir -p "$out/dictionaries"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
mkdir "$bin/targets" "$bin/corpora"
for source in fuzz_targets/*.rs; do
    name=$(basename "$source" .rs)
    strip -o "$bin/targets/$name" "$target_dir/$triple/release/$name"
done
python3 make_seeds.py "$bin/corpora"
# What earlier runs here found, too.
for folder in corpus/*/; do
    [ -d "$folder" ] && cp -rn "$folder" "$bin/corpora/"
done
# The targets share most of their code: one window over all of them.
tar -C "$bin/targets" -c . --sort=name --owner=0 --group=0 | xz -T1 -9 --lzma2=preset=9,dict=192MiB >"$out/targets.tar.xz"
tar -C "$bin/corpora" -cJf "$out/corpora.tar.xz" --sort=name --owner=0 --group=0 .
cp dictionaries/*.dict "$out/dictionaries/"
cp run.sh "$out/run.sh"
du -sh "$out"
