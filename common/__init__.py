"""What scripts and tools share: constants, images, augmentation, checkpoints, run folders, plots."""
