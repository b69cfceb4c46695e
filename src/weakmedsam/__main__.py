"""``python -m weakmedsam``: fit, validate, test and predict, by LightningCLI."""

if __name__ == "__main__":
    # Inside the guard: processes that only prepare volumes import this file, and need no torch.
    from weakmedsam.system.fast_import import interruptible, many_imports

    with interruptible():
        with many_imports():
            from weakmedsam.cli import main

        main()
