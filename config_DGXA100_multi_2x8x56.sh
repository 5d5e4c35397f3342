# config_DGXA100_multi_2x8x56.sh: 2 NVIDIA DGX A100, 16×A100, hyperparameters of MLPerf v0.7 submission (5.7 minutes)
# shellcheck shell=bash
export DGXNNODES=2
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=00:20:00
export DATADIR=${DATADIR:-data/coco}
export SSD_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth
export SSD_RULESET=0.7.0
export SSD_EVAL_EPOCHS=40,50,55,60,65,70,75,80
export SSD_BATCH_SIZE=56      # images per accelerator, 896 in total
export SSD_BASE_LR=3.2e-3     # per 32 images
export SSD_LR_ROUND_TO=2.5e-3 # peak 0.09
export SSD_WARMUP_STEPS=650
export SSD_WEIGHT_DECAY=1.3e-4
export SSD_PRECISION=fp16
export SSD_EVAL_BATCH_SIZE=160 # images per accelerator
export SSD_NUM_WORKERS=15      # processes per rank, of 128 cores
