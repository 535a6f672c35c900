#!/bin/bash
# MaxMin PPO of a 7B model with adapters, one trainer and 15 rollout workers with a GPU each, on a Ray cluster:
#
#   ray job submit --address http://HEAD:8265 --entrypoint-num-gpus 1 -- bash /shared/ray_job.sh
#
# or as a RayJob, by ray_job.yaml. /shared holds this file, models, data and output, and all machines have it. A
# worker that dies is replaced; a job that is submitted again goes on from its last checkpoint. Ray 2.60 lets in who
# has the cluster's token alone: ray get-auth-token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.
set -euo pipefail

cd /shared
RESUME=()
if compgen -G "runs/ppo/checkpoint-*" > /dev/null; then RESUME=(--resume_from_checkpoint last); fi

exec python -m torchrl_maxmin ppo \
    --rollout_workers 15 \
    --rollout_worker_gpus 1 \
    --ray_address auto \
    --max_staleness 1 \
    --importance_sampling_cap 2 \
    --model_name_or_path models/sft \
    --reward_model_path models/reward \
    --dataset_name data/prompts.jsonl \
    --output_dir runs/ppo \
    --device cuda \
    --dtype bfloat16 \
    --use_peft true \
    --gradient_checkpointing true \
    --rollout_batch_size 960 \
    --mini_batch_size 64 \
    --per_device_train_batch_size 4 \
    --generation_batch_size 64 \
    --scoring_batch_size 32 \
    --response_length 512 \
    --max_prompt_length 512 \
    --num_iterations 200 \
    --save_steps 10 \
    "${RESUME[@]}"
