"""The networks, each written as a forward pass over the modules of diffusers or transformers."""
