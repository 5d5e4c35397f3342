# config_DGX1.sh: NVIDIA DGX-1, 8×V100, hyperparameters of the MLPerf v0.7 submission (20.7 minutes)
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=01:00:00
export DATADIR=${DATADIR:-data/coco}
export SSD_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth
export SSD_RULESET=0.7.0
export SSD_EVAL_EPOCHS=40,50,55,60,65,70,75,80
export SSD_BATCH_SIZE=120     # images per accelerator, 960 in total
export SSD_BASE_LR=2.92e-3    # per 32 images
export SSD_LR_ROUND_TO=2.5e-3 # peak 0.0875
export SSD_WARMUP_STEPS=650
export SSD_WEIGHT_DECAY=1.6e-4
export SSD_PRECISION=fp16
export SSD_EVAL_BATCH_SIZE=160 # images per accelerator
export SSD_NUM_WORKERS=5       # processes per rank, of 40 cores
