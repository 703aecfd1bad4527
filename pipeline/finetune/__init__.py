"""Fine-tuning: data, schedule, loss and the training loop, shared by all methods."""
