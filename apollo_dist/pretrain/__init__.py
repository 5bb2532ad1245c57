"""LLaMA pre-training under DeepSpeed, FSDP2 or DDP: ``python -m apollo_dist.pretrain --help``."""
