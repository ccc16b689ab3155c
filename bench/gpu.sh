#!/usr/bin/env bash
# Everything a CUDA machine has to show, in one call:   bench/gpu.sh OUT_DIR
#
# Made for a bare machine without network that has its own Python, torch, Triton and timm. Python
# packages it lacks are taken from wheels in .whl/ (see bench/README.md). Tests come first, then
# benchmarks, most important first; every part has its own time limit and log, and a part that fails
# hides no other. Rows go to OUT_DIR/rows.jsonl as they come, the summary to OUT_DIR/summary.txt.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu.sh OUT_DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
rows=$out/rows.jsonl summary=$out/summary.txt
python=${PYTHON:-python3}
: >"$summary"

part() { # part NAME SECONDS COMMAND...: runs it with a limit and a log, notes how it ended
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    printf '%-14s exit %3d  %4d s  %s\n' "$name" "$status" $((SECONDS - started)) \
        "$(tail -n 1 "$out/$name.log" | cut -c 1-100)" | tee -a "$summary"
}

install() {
    if compgen -G ".whl/*.whl" >/dev/null; then
        local site
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --target "$site" .whl/*.whl || return
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    fi
    "$python" -c 'import safer_fast.kernels' 2>/dev/null && return
    # no installation: kernels is linked to where it is imported from
    [ -e safer_fast/kernels ] || ln -s ../kernels safer_fast/kernels
    "$python" setup.py --quiet build_ext --inplace || echo "native CPU library: not built"
}

bench_peers() { # bench_peers NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m bench.peers --output "$rows" "$@"
}

bench_step() { # bench_step NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m bench.step --output "$rows" "$@"
}

install >"$out/install.log" 2>&1
tail -n 2 "$out/install.log"
part doctor 60 "$python" -m safer_fast.doctor
part tests 180 "$python" -m pytest -m gpu -p no:cacheprovider
part ops 60 "$python" -m bench.ops --output "$rows"
large=(--model vit_large_patch16_224 --image-size 224 --patch-size 16 --layers blocks.18.mlp.fc1)
small=(--model vit_small_patch16_224 --image-size 224 --patch-size 16 --layers blocks.9.mlp.fc1)
tiny=(--model vit_tiny_patch16_224 --image-size 32 --patch-size 4 --layers blocks.10.mlp.fc1)
bench_step large-step 70 "${large[@]}" --batch-size 128 --compile
bench_peers large-peers 120 "${large[@]}" --batch-size 128 --compile --repeats 3
bench_peers small-peers 90 "${small[@]}" --batch-size 256 --steps 10 --compile --repeats 3
bench_step small-step 50 "${small[@]}" --batch-size 256 --steps 10 --compile
bench_peers tiny-peers 60 "${tiny[@]}" --batch-size 512 --steps 10 --repeats 3
bench_step tiny-step 40 "${tiny[@]}" --batch-size 512 --steps 10
cat "$summary"
