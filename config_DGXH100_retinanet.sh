# config_DGXH100_retinanet.sh: NVIDIA DGX H100, 8×H100, global batch of 256 from the fastest submissions
# shellcheck shell=bash
export DGXNNODES=1
export DGXNGPU=${DGXNGPU:-8}
export WALLTIME=02:00:00
export DATADIR=${DATADIR:-data/openimages}
export RETINANET_PRETRAINED_BACKBONE=${PRETRAINED_DIR:-data}/resnext50_32x4d-7cdf4587.pth
export RETINANET_RULESET=5.1.0
export RETINANET_BATCH_SIZE=32 # images per accelerator, 256 in total
export RETINANET_BASE_LR=8.5e-5
export RETINANET_WARMUP_EPOCHS=0
export RETINANET_PRECISION=bf16
export RETINANET_EVAL_BATCH_SIZE=32 # images per accelerator
export RETINANET_NUM_WORKERS=14     # processes per rank, of 112 cores
