"""Self-supervised pretraining on 2D brain-MRI slices (paper sec. 4.2)."""
