"""SSD300: what is trained. Read train.py first, then model.py, loss.py and augment.py."""
