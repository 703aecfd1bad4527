"""Reading checkpoints and models: tensor names, weight files, model structure, language and vision models."""
