"""The commands of `plasticity-peft`, one a file. typer is imported here and in cli.py only."""
