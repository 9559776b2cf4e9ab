"""The files of a saved adapter: what each contains, how it is validated, and the model card."""
