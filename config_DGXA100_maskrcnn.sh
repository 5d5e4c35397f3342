# config_DGXA100_maskrcnn.sh: NVIDIA DGX A100, 8×A100, global batch of 96 from the MLPerf v0.7 submissions
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=04:00:00
export DATADIR=${DATADIR:-data/coco}
export MASKRCNN_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/R-50.pkl
export MASKRCNN_RULESET=1.1.0
export MASKRCNN_BATCH_SIZE=12    # images per accelerator, 96 in total
export MASKRCNN_BASE_LR=0.02     # per 16 images
export MASKRCNN_LR_ROUND_TO=0.02 # peak 0.12
export MASKRCNN_WARMUP_STEPS=625
export MASKRCNN_LR_DECAY_IMAGES=1152000,1536000 # 12,000 and 16,000 steps
export MASKRCNN_PRECISION=bf16
export MASKRCNN_EVAL_BATCH_SIZE=16 # images per accelerator
export MASKRCNN_NUM_WORKERS=8      # processes per rank, of 128 cores
