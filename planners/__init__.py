"""What ``nnUNetv2_plan_experiment -pl`` finds."""
