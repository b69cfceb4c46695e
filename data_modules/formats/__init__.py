"""One reader per format; ``read.read_scan`` chooses the right one."""
