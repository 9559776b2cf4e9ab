"""From a model to its components: which modules belong to which component, and how the model calls them."""
