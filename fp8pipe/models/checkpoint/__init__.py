"""The files of a checkpoint: tensors, shards, GGUF, and the files stored beside the weights."""
