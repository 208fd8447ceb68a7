"""python -m gtcpserver: the same as the gtcpserver command."""

from .cli import main

if __name__ == "__main__":
    main()
