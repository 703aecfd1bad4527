"""Files of a checkpoint: tensors, shards, GGUF, and the files beside the weights."""
