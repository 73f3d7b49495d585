"""Starting stages: what a launcher is, which process this is of those of a stage, and the launchers themselves."""
