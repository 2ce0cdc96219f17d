#!/usr/bin/env bash
# Makes the plans behind benchmarks/plan.md, and its tables: the paper's batch of 64 pairs, compiled by libtpu for slices
# that are not here, or by JAX's CUDA plugin for GPUs that are not.
#   bash benchmarks/plan_table.sh tpu|gpu [PYTHON]   # one to four minutes a line on two CPU cores; a line that is there is kept
# A line: configuration, model, devices, mesh as fsdp x tensor, further arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-tpu} python=${2:-python}
plans=.cache/plans/$kind
mkdir -p "$plans"

tpu_lines() {
  cat <<'LINES'
paper_llama2_7b_hh llama2-7b v5p:2x2x2 8 1
paper_llama2_7b_hh llama2-7b v6e:2x4 8 1
paper_llama2_13b_hh llama2-13b v5p:2x2x2 8 1
paper_llama2_7b_hh llama2-70b v5p:4x4x4 64 1
paper_mistral7b_hh mistral-7b v6e:2x4 8 1
paper_llama2_7b_hh llama2-7b v5e:4x4 16 1
paper_llama2_13b_hh llama2-13b v6e:4x4 16 1
paper_mistral7b_hh mistral-7b v5e:4x4 16 1
paper_llama2_13b_hh llama2-13b v5e:4x8 32 1
paper_mistral7b_hh mistral-7b v5p:2x2x2 8 1
paper_llama2_7b_hh llama2-70b v5p:4x4x4 16 4
LINES
  families v5p:2x2x2
}

# Models of other families, full and LoRA on bfloat16 (attention alone in mixtures of experts): families TOPOLOGY
families() {
  local lora="--lora.rank 16 --lora.base_dtype bfloat16" attention="--lora.targets [q_proj,k_proj,v_proj,o_proj]"
  cat <<LINES
paper_mistral7b_hh gemma-3-27b $1 8 1
paper_mistral7b_hh gemma-3-27b $1 8 1 $lora
paper_mistral7b_hh qwen3-30b-a3b $1 8 1
paper_mistral7b_hh qwen3-30b-a3b $1 8 1 $lora $attention
paper_mistral7b_hh mixtral-8x7b $1 8 1
paper_mistral7b_hh mixtral-8x7b $1 8 1 $lora $attention
paper_mistral7b_hh gpt-oss-20b $1 8 1
paper_mistral7b_hh gpt-oss-20b $1 8 1 $lora $attention
LINES
}

gpu_lines() {
  local lora="--lora.rank 16 --lora.base_dtype bfloat16 --batch.pairs 8"
  cat <<LINES
paper_llama2_7b_hh llama2-7b h100:8 8 1
paper_mistral7b_hh mistral-7b h100:8 8 1
paper_llama2_13b_hh llama2-13b h100:8 8 1
paper_llama2_7b_hh llama2-7b a100-80gb:8 8 1
paper_mistral7b_hh mistral-7b a100-80gb:8 8 1
paper_llama2_13b_hh llama2-13b a100-80gb:8 8 1
paper_llama2_7b_hh llama2-70b h100:8x8 64 1
paper_llama2_7b_hh llama2-70b h100:8x8 8 8
paper_llama2_7b_hh llama2-7b h100:1 1 1 $lora
paper_llama2_7b_hh llama2-7b rtx4090:1 1 1 $lora --model.remat full
paper_llama2_7b_hh llama2-7b rtx4090:1 1 1 ${lora/bfloat16/nf4} --model.remat full
paper_mistral7b_hh gemma-3-27b h100:1 1 1 ${lora/bfloat16/nf4} --model.remat full
LINES
  families h100:8
}

while read -r config model topology fsdp tensor more; do
  name=$model
  case $more in *nf4*) name=$model-qlora ;; *--lora.rank*) name=$model-lora ;; esac
  name=${name}_${topology/:/_}_${fsdp}x${tensor}
  if [ ! -f "$plans/$name.json" ]; then
    # shellcheck disable=SC2086
    "$python" -m rpo_jax.plan --config "configs/$config.yaml" --model "$model" --topology "$topology" \
      --mesh.fsdp "$fsdp" --mesh.tensor "$tensor" --batch.micro_rows null \
      --lengths benchmarks/hh_lengths.json --json "$plans/$name.json" $more \
      < /dev/null || [ -f "$plans/$name.json" ]  # what does not fit is a line too
  fi
done < <("${kind}_lines")
"$python" -m benchmarks.plan_table "$plans"
