"""Mixins for nnU-Net's trainers and planners, and checks of nnU-Net's checkpoints and interface."""
