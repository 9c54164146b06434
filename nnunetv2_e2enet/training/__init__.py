"""nnU-Net's side of E2ENet: what its trainers and planners are made of."""
