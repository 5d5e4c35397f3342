"""Training framework shared by the workloads. Start reading at engine/train_loop.py."""
