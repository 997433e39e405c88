"""Neural tangent kernels of language models, and what they say about fine-tuning."""
