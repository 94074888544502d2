#!/usr/bin/env bash
# What a GPU has to show, in one go, the most telling first; each part's result lies in OUT as soon as it is there, and a
# part that fails does not stop the others. NOT RUN BY US on a GPU: none was there.
#
#   bash benchmarks/gpu.sh OUT [STEPS]
#
# Wants, and leaves out what it does not find: models/smollm2-135m, models/qwen2.5-coder-0.5b (any copies of
# SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct), and in DATA (default: .) math_train.parquet and
# amc2023_20times.parquet (verl's format). STEPS (default 40) of GRPO and of DSRL on MATH.
set -uo pipefail
out=$(realpath -m "${1:?bash benchmarks/gpu.sh OUT [STEPS]}") steps=${2:-40} data=${DATA:-.}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
mkdir -p "$out"

part() { # NAME COMMAND...
  local name=$1 start=$SECONDS code
  shift
  "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "$name: exit $code, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  ((code)) && tail -n 15 "$out/$name.log"
}
doctor() { prerl doctor --json >"$out/doctor.json"; }
fit() { # NAME CONFIG ARGUMENTS...
  local name=$1 config=$2
  shift 2
  prerl fit --config "configs/$config.yaml" --trainer.default_root_dir "$out/runs" --export.enabled=false "$@" || return
  cp "$(find "$out/runs/$config" -name metrics.csv | sort -V | tail -n 1)" "$out/$name.csv"
}

part doctor doctor
part embedded fit embedded dsrl
if [ -d models/smollm2-135m ]; then
  part smollm2 fit smollm2 smollm2_add --data.engine.init_args.kv_cache_mib null
  part engine python benchmarks/engine.py models/smollm2-135m --out "$out/engine.json"
fi
part train_step python benchmarks/train_step.py --shape qwen3-0.6b --out "$out/train_step.json"
part train_step_not_shared python benchmarks/train_step.py --shape qwen3-0.6b --no_share --out "$out/train_step.json"
part train_step_recomputed python benchmarks/train_step.py --shape qwen3-0.6b --checkpointing --out "$out/train_step.json"
if [ -d models/qwen2.5-coder-0.5b ] && [ -f "$data/math_train.parquet" ]; then
  for objective in grpo dsrl; do
    part "math_$objective" fit "math_$objective" "qwen05_math_$objective" --trainer.max_steps "$steps" \
      --data.train.init_args.path "$data/math_train.parquet" --data.val.init_args.path "$data/amc2023_20times.parquet"
  done
  part report prerl report "$out/runs/qwen05_math_grpo" "$out/runs/qwen05_math_dsrl" -o "$out/report.html"
fi
