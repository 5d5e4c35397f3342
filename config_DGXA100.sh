# config_DGXA100.sh: NVIDIA DGX A100, 8×A100, hyperparameters of the MLPerf v1.1 submission (8.3 minutes)
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=00:30:00
export DATADIR=${DATADIR:-data/coco}
export SSD_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth
export SSD_RULESET=1.1.0
export SSD_EVAL_EPOCHS="every 5"
export SSD_BATCH_SIZE=114     # images per accelerator, 912 in total
export SSD_BASE_LR=3.2e-3     # per 32 images
export SSD_LR_ROUND_TO=2.5e-3 # peak 0.09
export SSD_WARMUP_STEPS=650
export SSD_WEIGHT_DECAY=1.3e-4
export SSD_PRECISION=fp16
export SSD_EVAL_BATCH_SIZE=160 # images per accelerator
export SSD_NUM_WORKERS=15      # processes per rank, of 128 cores
