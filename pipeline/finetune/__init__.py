"""Fine-tuning: data, schedule, loss and the loop that every method shares."""
