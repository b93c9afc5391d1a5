"""Entry point of `python -m lightning_ipu_bert`."""

from lightning_ipu_bert.cli import main

if __name__ == "__main__":
    main()
