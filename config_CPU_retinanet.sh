# config_CPU_retinanet.sh: any CPU, for trials: a step of four images
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-1}
export WALLTIME=1000:00:00
export DATADIR=${DATADIR:-data/openimages}
export RETINANET_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnext50_32x4d-7cdf4587.pth
export RETINANET_RULESET=5.1.0
export RETINANET_BATCH_SIZE=4 # images per step
export RETINANET_BASE_LR=8.5e-5
export RETINANET_WARMUP_EPOCHS=0
export RETINANET_EVAL_BATCH_SIZE=4 # images per accelerator
export RETINANET_NUM_WORKERS=1     # processes per rank, of 2 cores
