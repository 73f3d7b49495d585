"""Stages on this machine, side by side as far as its devices allow."""
