"""Files from outside: read as another user, and only where nobody else may have changed them."""
