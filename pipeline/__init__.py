"""The stages that change weights (fine-tuning and quantization), their dry runs, and workflows of stages."""
