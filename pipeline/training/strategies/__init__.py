"""How a stage's network and its optimiser's state are spread over processes: whole on each, or sharded by ZeRO."""
