"""Prompt affinity mining (PAM): from class activation maps to pseudo-labels."""
