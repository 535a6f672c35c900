#!/bin/bash
# MaxMin PPO of a 7B model with adapters on 2 nodes of 8 GPUs: sbatch examples/cluster/slurm.sh
#
# The folder that is submitted from is shared by all nodes, and so are models, data and output. A job that is
# preempted or killed is queued again and goes on from its last checkpoint.
#SBATCH --job-name=maxmin-ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=maxmin-ppo-%j.log
set -euo pipefail

OUTPUT=${OUTPUT:-runs/ppo}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=()
if compgen -G "$OUTPUT/checkpoint-*" > /dev/null; then RESUME=(--resume_from_checkpoint last); fi

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node 8 \
    --max-restarts 3 \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD:29500" \
    -m torchrl_maxmin ppo \
    --distributed ddp \
    --model_name_or_path models/sft \
    --reward_model_path models/reward \
    --dataset_name data/prompts.jsonl \
    --output_dir "$OUTPUT" \
    --device cuda \
    --dtype bfloat16 \
    --use_peft true \
    --gradient_checkpointing true \
    --rollout_batch_size 1024 \
    --mini_batch_size 256 \
    --per_device_train_batch_size 4 \
    --generation_batch_size 64 \
    --scoring_batch_size 32 \
    --response_length 512 \
    --max_prompt_length 512 \
    --num_iterations 200 \
    --save_steps 10 \
    "${RESUME[@]}"
