"""Fine-tuning on several devices, one process for each, with FSDP2; see docs/distributed.md."""
