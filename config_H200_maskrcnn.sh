# config_H200_maskrcnn.sh: one NVIDIA H200 (141 GB), global batch of 64, not yet run to the targets
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=12:00:00
export DATADIR=${DATADIR:-data/coco}
export MASKRCNN_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/R-50.pkl
export MASKRCNN_BATCH_SIZE=64    # images per accelerator
export MASKRCNN_BASE_LR=0.02     # per 16 images
export MASKRCNN_LR_ROUND_TO=0.02 # peak 0.08
export MASKRCNN_WARMUP_STEPS=800
export MASKRCNN_LR_DECAY_IMAGES=1152000,1536000 # 18,000 and 24,000 steps
export MASKRCNN_PRECISION=bf16
export MASKRCNN_EVAL_BATCH_SIZE=32 # images per accelerator
export MASKRCNN_NUM_WORKERS=14     # processes per rank, of 16 cores
