"""Exports of language models to TensorRT: a decoder graph with static scales, or a checkpoint in ModelOpt's layout."""
