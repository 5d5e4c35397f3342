# config_synthetic_coco.sh: any machine, without COCO: two epochs on synthetic images of COCO's number and size
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=1-00:00:00
export DATADIR=${DATADIR:-data/synthetic_coco}
export SYNTHETIC_IMAGES=${SYNTHETIC_IMAGES:-118287} # training images, plus 1/24 of that for evaluation: 20 GB
export SSD_DATASET=synthetic_coco
export SSD_DIVISION=open  # the data set is not COCO
export SSD_BATCH_SIZE=32  # images per accelerator
export SSD_BASE_LR=2.5e-3 # per 32 images
export SSD_WARMUP_STEPS=300
export SSD_EPOCHS=2
export SSD_EVAL_EPOCHS=2
export SSD_TARGET=0 # box mAP: every completed run succeeds, with a RESULT line and status 0
