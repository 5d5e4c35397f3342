# config_DGX1_maskrcnn.sh: NVIDIA DGX-1, 8×V100, global batch of 48 from the MLPerf v0.7 submissions
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=08:00:00
export DATADIR=${DATADIR:-data/coco}
export MASKRCNN_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/R-50.pkl
export MASKRCNN_RULESET=0.7.0
export MASKRCNN_BATCH_SIZE=6     # images per accelerator, 48 in total
export MASKRCNN_BASE_LR=0.02     # per 16 images
export MASKRCNN_LR_ROUND_TO=0.02 # peak 0.06
export MASKRCNN_WARMUP_STEPS=625
export MASKRCNN_LR_DECAY_IMAGES=1152000,1536000 # 24,000 and 32,000 steps
export MASKRCNN_PRECISION=fp16
export MASKRCNN_EVAL_BATCH_SIZE=8 # images per accelerator
export MASKRCNN_NUM_WORKERS=4     # processes per rank, of 40 cores
