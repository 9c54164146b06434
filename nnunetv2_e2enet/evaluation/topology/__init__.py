"""What dynamic sparse feature fusion has learned: numbers, figures and a page from checkpoints and histories."""
