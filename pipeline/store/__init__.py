"""Space: what the runs of a store need of it, what it takes, and removing the rest."""
