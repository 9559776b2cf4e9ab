"""The place in PEFT: the config, the tuner, the model, and loading what was saved."""
