"""HeteroLoRA's shortcuts in a model: their layers, the hooks on the residual stream, and what is written of them."""
