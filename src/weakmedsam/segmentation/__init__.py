"""The segmentation network that learns from pseudo-labels, its test and its predictions."""
