# config_toy_maskrcnn.sh: any machine, two CPU cores will do: Mask R-CNN from scratch on pictures that the program draws
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=00:15:00
export DATADIR=${DATADIR:-data/toy}
export MASKRCNN_DATASET=toy
export MASKRCNN_DIVISION=open # the data are not COCO
export MASKRCNN_BATCH_SIZE=4  # images per accelerator
export MASKRCNN_BASE_LR=0.04  # per 16 images
export MASKRCNN_WARMUP_STEPS=50
export MASKRCNN_DECAY_IMAGES=3200,3600
export MASKRCNN_TRUNK=resnet18
export MASKRCNN_FROZEN_STAGES=0
export MASKRCNN_FREEZE_BATCH_NORM=false # from scratch: there are no statistics to freeze
export MASKRCNN_BATCH_NORM_EPS=1e-5
export MASKRCNN_PIXELS=rgb-unit
export MASKRCNN_MIN_IMAGE_SIZE=192
export MASKRCNN_MAX_IMAGE_SIZE=256
export MASKRCNN_ANCHOR_SIZES=16,32,64,128,256
export MASKRCNN_RPN_BEFORE_NMS=500 MASKRCNN_RPN_BEFORE_NMS_EVAL=500
export MASKRCNN_RPN_AFTER_NMS=400 MASKRCNN_RPN_AFTER_NMS_EVAL=100
export MASKRCNN_BOX_SAMPLES=64 # per image
export MASKRCNN_EPOCHS=10
export MASKRCNN_EVAL_EPOCHS="every 1"
export MASKRCNN_TARGET=0.30      # box mAP
export MASKRCNN_MASK_TARGET=0.25 # mask mAP
export MASKRCNN_EVAL_BATCH_SIZE=8
export MASKRCNN_NUM_WORKERS=1 # processes per rank
export MASKRCNN_LOG_EVERY=10  # steps
