"""The one place that assembles a Trainer and runs a stage."""
