#!/usr/bin/env bash
# Six tasks on eight real data sets, from images to a report, with the demo's nine teachers and its student.
#
#   mmkd demo mmkd-demo
#   examples/six_tasks/run.sh DATA mmkd-demo six-tasks
#
# DATA holds brain_mri/ (one folder a class), breastmnist.npz, medical_mnist_small.npz, pmc_pairs/, vqa_rad/,
# survival/ (PORPOISE's table of TCGA KIRC, zipped) and wsi/ (two slides); where each is from stands in sets/*.yaml.
# Running it again does only what is missing. It needs `pip install 'mmkd[demo,leakage,wsi]'`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$1" && pwd) demo=$(cd "$2" && pwd) out=$3
mkdir -p "$out"
out=$(cd "$out" && pwd)

printf 'data: %s\nwork: %s\nstores: %s/stores\n' "$data" "$out" "$out" > "$out/roots.yaml"
export MMKD_ROOTS=$out/roots.yaml
test -f "$out/kirc.csv" || python3 -m zipfile -e "$data/survival/porpoise_tcga_kirc_all_clean.csv.zip" "$out"
test -f "$out/kirc.csv" || mv "$out/tcga_kirc_all_clean.csv.zip" "$out/kirc.csv"  # a CSV, whatever it is called

teachers=student=local-dir:$demo/student
for folder in "$demo"/teachers/*/; do
  teachers+=,$(basename "$folder")=local-dir:${folder%/}
done
for set in "$here"/sets/*.yaml; do
  mmkd extract "$set" "$out/stores/$(basename "$set" .yaml)" --teachers "$teachers"
done

suite=$here/suite.yaml results=$out/results
mmkd evaluate check "$suite"
mmkd evaluate run "$suite" --out "$results"
mmkd evaluate report "$suite" "$out/report.html" --model student --out "$results" --by dataset
mmkd evaluate leakage "$suite" --training "$demo/features" --hashes "$out/hashes.parquet" > "$out/leakage.txt"
mmkd evaluate table "$suite" --out "$results" --by dataset > "$out/tables.md"
echo "wrote $out/report.html, tables.md and leakage.txt"
