"""How staged training is run: configs, the stage graph, data, training, reports. Knows nothing of DALL·E 2."""
