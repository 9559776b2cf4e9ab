"""The inputs of components: the tokens that enter block 0, or what a component receives in the running network."""
