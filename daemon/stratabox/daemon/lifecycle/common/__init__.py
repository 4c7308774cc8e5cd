"""What all use cases share and that knows none of them."""
