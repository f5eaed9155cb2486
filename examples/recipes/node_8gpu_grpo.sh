#!/usr/bin/env bash
# One node with 8 GPUs: 0 to 3 train (FSDP2), 4 to 7 generate for all of them. README.md explains every flag.
#   MODEL=/models/Qwen2.5-VL-3B-Instruct ./node_8gpu_grpo.sh [key=value ...]      keys of node_8gpu_grpo.toml
# TERM or ctrl-C: the trainer finishes its step and saves, then the servers are stopped. The same command goes on.
set -euo pipefail
: "${MODEL:?folder of the checkpoint}"
here=$(cd "$(dirname "$0")" && pwd)
export VTENGINE_BACKEND_API_KEY=${VTENGINE_BACKEND_API_KEY:-$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')}

servers=()
trainer=
stopping=
stop() {
    stopping=yes
    [ -z "$trainer" ] || kill -TERM "$trainer" 2>/dev/null || true
}
trap 'kill "${servers[@]}" 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT # nothing to save yet
for gpu in 4 5 6 7; do
    CUDA_VISIBLE_DEVICES=$gpu VTENGINE_SGLANG_HOOKS=flush SGLANG_VLM_CACHE_SIZE_MB=2048 \
        TORCH_NCCL_ASYNC_ERROR_HANDLING=2 python -m sglang.launch_server --model-path "$MODEL" --host 127.0.0.1 --port $((30000 + gpu)) \
        --api-key "$VTENGINE_BACKEND_API_KEY" --dtype bfloat16 --enable-multimodal --page-size 1 \
        --mem-fraction-static 0.85 --skip-server-warmup > "sglang-$gpu.log" 2>&1 &
    servers+=($!)
done
for gpu in 4 5 6 7; do
    until curl -sf "http://127.0.0.1:$((30000 + gpu))/health" > /dev/null; do
        for server in "${servers[@]}"; do
            kill -0 "$server" || { echo "a server ended, see sglang-*.log" >&2; exit 1; }
        done
        sleep 2
    done
done

settings=()
for setting in "model=$MODEL" "$@"; do settings+=(--set "$setting"); done
trap stop TERM INT
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600
CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --standalone --nproc-per-node 4 \
    -m vtengine_training.cli grpo "$here/node_8gpu_grpo.toml" "${settings[@]}" &
trainer=$!
[ -z "$stopping" ] || stop # a signal that came before the trainer had a name
status=0
wait "$trainer" || status=$?
while kill -0 "$trainer" 2>/dev/null; do # a signal ends `wait`, not the trainer
    status=0
    wait "$trainer" || status=$?
done
exit "$status"
