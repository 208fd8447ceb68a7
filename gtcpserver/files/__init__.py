"""External files: read with another user's help, and only where no other user can have changed them."""
