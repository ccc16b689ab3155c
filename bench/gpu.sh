#!/usr/bin/env bash
# What a CUDA machine has to show, in one call of under nine minutes:
#
#     bench/gpu.sh OUT_DIR [PART ...]
#
# Made for a bare machine without network that has its own Python, torch, Triton and timm. Python
# packages it lacks are taken from wheels in .whl/ (see bench/README.md). Parts come in the order of
# what is known least; each has its own time limit, one that fails hides no other, and those for
# which no time is left are skipped and named. PART ... runs only these: what was skipped, in
# another call.
# Rows go to OUT_DIR/rows.jsonl as they come, how each part ended to summary.txt, what it printed to
# logs.tar.gz. The part `experiment` takes a whole call, and runs only where it is asked for; its runs
# lie in runs/ and are resumed while the machine is held. GPU_SH_REHEARSE=1 runs small cases, on any
# machine, GPU_SH_REHEARSE=graphs with CUDA graphs; GPU_SH_SECONDS is the time in all.
set -uo pipefail
: "${1:?usage: bench/gpu.sh OUT_DIR [PART ...]}"
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit
shift
wanted=("$@")
cd "$(dirname "$0")/.."
rows=$out/rows.jsonl summary=$out/summary.txt logs=$(mktemp -d)
python=${PYTHON:-python3}
deadline=${GPU_SH_SECONDS:-520}
: >"$summary"

note() { # note NAME TEXT: a line of the summary, on the screen too
    printf '%-16s %s\n' "$@" | tee -a "$summary"
}

is_wanted() { # is_wanted NAME: whether this part was asked for
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]
}

part() { # part NAME SECONDS COMMAND...: runs it with a limit and a log; fails if it does, not if late
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS status=0
    shift 2
    is_wanted "${name%-again}" || return 0
    if [ "$left" -lt 20 ]; then
        note "$name" "skipped: no time left"
        return 0
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
    note "$name" "exit $status, $((SECONDS - started)) s: $(tail -n 1 "$logs/$name.log" | cut -c 1-100)"
    tar -czf "$out/logs.tar.gz" -C "$logs" .
    [ "$status" -eq 0 ] || [ "$status" -ge 124 ]
}

install() {
    if compgen -G ".whl/*.whl" >/dev/null; then
        local site
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
            --target "$site" .whl/*.whl || return
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    fi
    # no installation: kernels is linked to where it is imported from; nothing here needs C++
    "$python" -c 'import safer_fast.kernels' 2>/dev/null && return
    [ -e safer_fast/kernels ] || ln -s ../kernels safer_fast/kernels
}

bench() { # bench MODULE NAME SECONDS FLAGS...: rows with CUDA graphs, or without if that fails
    local name=$1-$2 limit=$3 with=(--compile --cuda-graph) without=(--compile)
    [ "$1" != attack ] || with=(--modes eager,compiled,captured) without=(--modes eager,compiled)
    local module=$1
    [ "$1" != float8 ] || module=studies.float8
    local command=("$python" -m "bench.$module" --output "$rows" "${@:4}")
    if [ "$has_graphs" = 1 ]; then
        part "$name" "$limit" "${command[@]}" "${with[@]}" && return
        name=$name-again
    fi
    part "$name" "$limit" "${command[@]}" "${without[@]}"
}

bench_data() { # bench_data PART FILE SECONDS: loaders, if the images travelled along
    local name=data-$1 folder=${SAFER_FAST_TEST_DATA:-.data}
    if [ -e "$folder/$2" ]; then
        SAFER_FAST_TEST_DATA=$folder part "$name" "$3" \
            "$python" -m bench.data --output "$rows" --parts "$1" "${data[@]}"
    elif is_wanted "$name"; then
        note "$name" "skipped: no $folder/$2 (see bench/README.md)"
    fi
}

bench_experiment() { # as much of the CIFAR-10 experiment as there is time for, if it was asked for
    local folder=${SAFER_FAST_TEST_DATA:-.data} minutes kept=runs/experiment.jsonl
    [ ${#wanted[@]} -gt 0 ] && is_wanted experiment || return 0
    minutes=$(((deadline - SECONDS - 90) / 60)) # a worker that is ended has a minute for its checkpoint
    mkdir -p runs
    part experiment "$deadline" "$python" -m bench.experiment "${experiment[@]}" --output "$kept" \
        --train "$folder/cifar10-train.parquet" --test "$folder/cifar10-test.parquet" \
        --budget-minutes "$minutes"
    [ ! -e "$kept" ] || cp "$kept" "$out/cifar10.jsonl"
}

large=(--model vit_large_patch16_224 --image-size 224 --patch-size 16)
base=(--model vit_base_patch16_224 --image-size 224 --patch-size 16)
small=(--model vit_small_patch16_224 --image-size 224 --patch-size 16)
tiny=(--model vit_tiny_patch16_224 --image-size 32 --patch-size 4)
large_batch=128 small_batch=256 tiny_batch=512 large_layer=blocks.18.mlp.fc1
large_sizes=64,128 base_sizes=128,256 small_sizes=256,512 tiny_sizes=512,1024
data=(--workers 8,16 --images 4000 --training-images 30000 --training-batch-size 256)
digits=()
experiment=(--scale full --models deit_tiny_patch16_224 --jobs 2)
steps=10 op_repeats=15 has_graphs=1
small_savings=() large_savings=()
accuracy=("$python" -m bench.studies.float8_accuracy "$logs/digits-run" --output "$rows")
rehearsal=${GPU_SH_REHEARSE:-0} tests=(-v --tb=short)
if [ "$rehearsal" != 0 ]; then
    large=(--model vit_tiny_patch16_224 --image-size 32 --patch-size 16 --repeats 2)
    base=("${large[@]}") small=("${large[@]}") tiny=("${large[@]}")
    large_batch=4 small_batch=4 tiny_batch=4 large_layer=blocks.9.mlp.fc1
    large_sizes=4 base_sizes=4 small_sizes=4 tiny_sizes=4
    data=(--workers 1 --repeats 2 --images 8 --batch-size 4 --small-images 64 --training-images 4)
    data+=(--training-batch-size 2 --training-steps 1 --training-model vit_tiny_patch16_224)
    digits=(--epochs 2 --selection.warmup_epochs 1 --attack.clean_epochs 1)
    digits+=(--attack.epsilon_warmup_epochs 0 --data.max_images 64 --evaluation.attacks clean)
    digits+=(--evaluation.steps 1 --evaluation.max_images 32 --evaluation.sentinel_images 0)
    experiment=(--scale reduced --jobs 1)
    steps=2 op_repeats=2 accuracy+=(--num-images 32 --steps 2)
    small_savings=(--leave-out "") large_savings=(--leave-out prefix)
    tests=(tests/system/test_gpu.py --collect-only -q)
    [ "$rehearsal" = graphs ] || has_graphs=0
fi
on_large=("${large[@]}" --batch-size "$large_batch" --layers "$large_layer" --steps 3)
on_small=("${small[@]}" --batch-size "$small_batch" --layers blocks.9.mlp.fc1 --steps "$steps")
on_tiny=("${tiny[@]}" --batch-size "$tiny_batch" --layers blocks.10.mlp.fc1 --steps "$steps")

install >"$logs/install.log" 2>&1
note install "exit $?, $SECONDS s: $(tail -n 1 "$logs/install.log")"
# First what nothing was known of before: the code on a real GPU, a whole run, FP8. Then what
# bench.roofline predicts, where a measurement is put beside arithmetic; then other models; last
# what is a choice between libraries.
part doctor 60 "$python" -m safer_fast.doctor
part tests 180 "$python" -m pytest -m gpu -p no:cacheprovider "${tests[@]}"
part digits 90 "$python" -m safer_fast.train --amp bf16 --output "$logs/digits-run" "${digits[@]}"
bench float8 large 130 "${large[@]}" --batch-sizes "$large_sizes" --layers "$large_layer" --steps 3
bench attack large 100 "${large[@]}" --batch-sizes "$large_sizes"
bench step large 70 "${on_large[@]}"
if [ -e "$logs/digits-run/model.safetensors" ]; then
    part float8-digits 40 "${accuracy[@]}"
    part bf16-digits 30 "${accuracy[@]}" --precision bf16
fi
bench peers large 130 "${on_large[@]}" --leave-out ""
bench attack small 60 "${small[@]}" --batch-sizes "$small_sizes"
bench step small 50 "${on_small[@]}"
bench peers small 110 "${on_small[@]}" "${small_savings[@]}"
bench attack base 70 "${base[@]}" --batch-sizes "$base_sizes"
bench attack tiny 60 "${tiny[@]}" --batch-sizes "$tiny_sizes"
bench float8 base 85 "${base[@]}" --batch-sizes "$base_sizes" --layers blocks.9.mlp.fc1 --steps 3
bench float8 small 75 "${small[@]}" --batch-sizes "$small_sizes" --layers blocks.9.mlp.fc1 --from 0
part ops 50 "$python" -m bench.ops --output "$rows" --repeats "$op_repeats"
part attention 60 "$python" -m bench.studies.attention --output "$rows" --repeats "$op_repeats"
bench peers tiny 90 "${on_tiny[@]}" --leave-out ""
bench_data photos photos-256.parquet 150
bench_data training photos-256.parquet 150
bench_data small cifar10-train.parquet 60
bench_experiment
bench peers savings 150 "${on_large[@]}" "${large_savings[@]}"
tar -czf "$out/logs.tar.gz" -C "$logs" .
echo
cat "$summary"
