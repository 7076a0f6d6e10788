"""The fused operators beside eager torch, torch.compile, tiles in plain torch, and other libraries."""
