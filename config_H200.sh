# config_H200.sh: one NVIDIA H200, the global batch of the 8×A100 submissions in four micro-batches
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=02:00:00
export DATADIR=${DATADIR:-data/coco}
export SSD_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth
export SSD_RULESET=1.1.0
export SSD_EVAL_EPOCHS="every 5"
export SSD_BATCH_SIZE=912     # images per accelerator; the reference point of 50 epochs covers batches up to 1024
export SSD_GRAD_ACCUM_STEPS=4 # micro-batches of 228 images, which fit its memory
export SSD_BASE_LR=3.2e-3     # per 32 images
export SSD_LR_ROUND_TO=2.5e-3 # peak 0.09
export SSD_WARMUP_STEPS=650
export SSD_WEIGHT_DECAY=1.3e-4
export SSD_PRECISION=bf16
export SSD_EVAL_BATCH_SIZE=256 # images per accelerator
export SSD_NUM_WORKERS=15      # processes per rank, of 16 cores
