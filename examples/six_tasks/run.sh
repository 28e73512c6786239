#!/usr/bin/env bash
# Six tasks on seven real data sets, from images to a report, with the demo's nine teachers and its student:
#
#   mmkd demo mmkd-demo
#   examples/six_tasks/run.sh DATA mmkd-demo six-tasks
#
# DATA holds brain_mri/ (a folder for each class), breastmnist.npz, medical_mnist_small.npz, pmc_pairs/, vqa_rad/,
# survival/ (PORPOISE's table of TCGA KIRC, zipped) and wsi/ (two slides); sets/*.yaml say where each is from.
# Running it again does only what is missing. It needs the extras demo, leakage and wsi (docs/install.md).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$1" && pwd) demo=$(cd "$2" && pwd)
mkdir -p "$3"
out=$(cd "$3" && pwd)

printf 'data: %s\nwork: %s\nstores: %s/stores\n' "$data" "$out" "$out" > "$out/roots.yaml"
export MMKD_ROOTS=$out/roots.yaml
# The zip holds a CSV that is called .csv.zip.
python3 - "$data/survival/porpoise_tcga_kirc_all_clean.csv.zip" "$out/kirc.csv" <<'END'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive, open(sys.argv[2], "wb") as table:
    table.write(archive.read(archive.namelist()[0]))
END

teachers=student=local-dir:$demo/student
for folder in "$demo"/teachers/*/; do
  teachers+=,$(basename "$folder")=local-dir:${folder%/}
done
# The sets are small: one to a core at a time, the largest (vqa-rad) first. OMP_NUM_THREADS would change what nproc says.
basename -s .yaml "$here"/sets/*.yaml | sort -r | xargs -P "$(env -u OMP_NUM_THREADS nproc)" -I{} \
  mmkd extract "$here/sets/{}.yaml" "$out/stores/{}" --teachers "$teachers" --workers 1

suite=$here/suite.yaml results=$out/results
mmkd evaluate check "$suite"
mmkd evaluate run "$suite" --out "$results"
mmkd evaluate table "$suite" --out "$results" --by dataset > "$out/tables.md"
mmkd evaluate report "$suite" "$out/report.html" --model student --out "$results" --by dataset
mmkd evaluate leakage "$suite" --training "$demo/features" --hashes "$out/hashes.parquet" > "$out/leakage.txt"
echo "look at $out/report.html, tables.md and leakage.txt"
