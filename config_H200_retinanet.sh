# config_H200_retinanet.sh: one NVIDIA H200 (141 GB), global batch of 256 by accumulation
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=12:00:00
export DATADIR=${DATADIR:-data/openimages}
export RETINANET_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnext50_32x4d-7cdf4587.pth
export RETINANET_RULESET=5.1.0
export RETINANET_BATCH_SIZE=256 # images per accelerator and optimizer step
export RETINANET_BASE_LR=8.5e-5
export RETINANET_WARMUP_EPOCHS=0
export RETINANET_GRAD_ACCUM_STEPS=4 # 64 images at once
export RETINANET_PRECISION=bf16
export RETINANET_EVAL_BATCH_SIZE=32 # images per accelerator
export RETINANET_NUM_WORKERS=14     # processes per rank, of 16 cores
