"""Hyperparameter sweeps: W&B sweep definitions, run by W&B or locally by Optuna."""
