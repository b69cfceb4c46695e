"""Sub-class exploration (SCE): k-means per class on the features of the classification network."""
