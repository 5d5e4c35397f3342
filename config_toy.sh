# config_toy.sh: any machine, two CPU cores will do: SSD300 from scratch on pictures that the program draws itself
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=00:15:00
export DATADIR=${DATADIR:-data/toy}
export SSD_DATASET=toy
export SSD_DIVISION=open # the data are not COCO
export SSD_BATCH_SIZE=8  # images per accelerator: a CPU is as fast with few, and takes more steps
export SSD_BASE_LR=4e-2  # per 32 images
export SSD_WARMUP_STEPS=20
export SSD_EPOCHS=12
export SSD_DECAY_EPOCHS=8,10
export SSD_EVAL_EPOCHS="every 1"
export SSD_TARGET=0.23   # box mAP
export SSD_NUM_WORKERS=1 # processes per rank
export SSD_LOG_EVERY=5   # steps
