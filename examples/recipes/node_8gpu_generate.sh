#!/usr/bin/env bash
# One node with 8 GPUs: a server per GPU, all questions over all of them. README.md explains every flag.
#   MODEL=/models/Qwen2.5-VL-7B-Instruct ./node_8gpu_generate.sh questions.jsonl answers.jsonl
set -euo pipefail
: "${MODEL:?folder of the checkpoint}"
questions=$1 answers=$2
export VTENGINE_BACKEND_API_KEY=${VTENGINE_BACKEND_API_KEY:-$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')}

servers=()
addresses=()
trap 'kill "${servers[@]}" 2>/dev/null; wait' EXIT
for gpu in 0 1 2 3 4 5 6 7; do
    port=$((30000 + gpu))
    CUDA_VISIBLE_DEVICES=$gpu SGLANG_VLM_CACHE_SIZE_MB=2048 python -m sglang.launch_server \
        --model-path "$MODEL" --host 127.0.0.1 --port "$port" --api-key "$VTENGINE_BACKEND_API_KEY" \
        --dtype bfloat16 --enable-multimodal --page-size 1 --mem-fraction-static 0.85 --chunked-prefill-size 8192 \
        > "sglang-$gpu.log" 2>&1 &
    servers+=($!)
    addresses+=("http://127.0.0.1:$port")
done
for address in "${addresses[@]}"; do
    until curl -sf "$address/health" > /dev/null; do
        for server in "${servers[@]}"; do
            kill -0 "$server" || { echo "a server ended, see sglang-*.log" >&2; exit 1; }
        done
        sleep 2
    done
done

vtengine generate "$questions" -o "$answers" --model "$MODEL" --backend "$(IFS=,; echo "${addresses[*]}")" \
    --resume
