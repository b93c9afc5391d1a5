"""The command line as a script."""

from lightning_ipu_bert.cli import main

if __name__ == "__main__":
    main()
