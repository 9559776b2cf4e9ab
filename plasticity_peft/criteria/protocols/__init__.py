"""What components are fed: the tokens that enter block 0, or what they receive in the running network."""
