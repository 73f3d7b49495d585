"""From captions to pictures with the networks of one run."""
