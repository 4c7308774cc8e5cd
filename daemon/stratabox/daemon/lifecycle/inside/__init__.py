"""What is done inside guests, through their own channel."""
