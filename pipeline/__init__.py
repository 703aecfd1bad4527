"""Stages that change a model's weights (fine-tuning and quantization), their dry runs, and workflows of stages."""
