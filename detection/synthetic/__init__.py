"""Generated data sets in COCO 2017's layout."""
