"""nnU-Net's workflow through its console commands, for every label scheme and configuration: ``make test-integration``."""
