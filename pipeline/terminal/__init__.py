"""What the commands show in a terminal: the progress of a run, tables, logs."""
