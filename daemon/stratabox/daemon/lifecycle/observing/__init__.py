"""What can be seen of guests from outside: their consoles and what they use. None is disturbed."""
