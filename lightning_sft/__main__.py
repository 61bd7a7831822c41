"""`python -m lightning_sft`."""

from lightning_sft.cli.main import main

if __name__ == "__main__":
    main()
