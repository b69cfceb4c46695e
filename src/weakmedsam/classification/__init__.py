"""The classification network, its class activation maps and its training."""
