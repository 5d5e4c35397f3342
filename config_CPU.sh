# config_CPU.sh: one machine without an accelerator, hyperparameters of the reference
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=30-00:00:00
export DATADIR=${DATADIR:-data/coco}
export SSD_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth
export SSD_RULESET=1.1.0
export SSD_EVAL_EPOCHS="every 5"
export SSD_DEVICE=cpu
export SSD_BATCH_SIZE=32  # images per accelerator
export SSD_BASE_LR=2.5e-3 # per 32 images
export SSD_WARMUP_STEPS=300
export SSD_WEIGHT_DECAY=5e-4
export SSD_PRECISION=auto
export SSD_NUM_WORKERS=2 # processes per rank
