"""RetinaNet: what is trained, and what it is trained and evaluated on."""
