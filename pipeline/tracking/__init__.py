"""Reports the figures of a run to the trackers that a team uses: TensorBoard, MLflow, Weights & Biases."""
