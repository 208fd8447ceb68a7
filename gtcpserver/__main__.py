"""python -m gtcpserver: the same as the gtcpserver command."""

from gtcpserver.cli import main

if __name__ == "__main__":
    main()
