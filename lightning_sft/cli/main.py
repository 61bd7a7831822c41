"""The program `lightning-sft`."""


def main() -> None:
    """Entry point."""
    from lightning_sft.cli.app import main as run

    run()
