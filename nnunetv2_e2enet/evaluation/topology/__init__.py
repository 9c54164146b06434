"""Topologies that DSFF has learned: numbers, figures and a page from checkpoints and histories."""
