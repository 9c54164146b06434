"""What ``nnUNetv2_train -tr`` finds."""
