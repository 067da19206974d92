"""A miniature world of cartoon portraits and a miniature SDXL that lives in it."""
