"""Generated data sets in COCO's layout."""
