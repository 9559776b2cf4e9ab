"""Runs the command line: `python -m plasticity_peft`, or `accelerate launch -m plasticity_peft`."""

from plasticity_peft.cli.app import main

if __name__ == "__main__":
    main()
