"""SSD300, the single-stage object detector of MLPerf Training (Liu et al. 2016, arXiv:1512.02325).

Read the modules in the order of the data:

1. train.py: the training program, which assembles the parts below
2. data.py and augment.py: annotated images to batches
3. anchors.py and box_coder.py: ground truth to training targets
4. model.py and loss.py: the network and its loss
5. postprocess.py and evaluator.py: predictions to detections and COCO metrics
"""
